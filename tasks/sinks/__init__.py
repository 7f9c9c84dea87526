"""Where events are told onward: one file per kind of receiver."""
