"""One module for each figure or family of figures; `measure(options)` returns its rows."""
