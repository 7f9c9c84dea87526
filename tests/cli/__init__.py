"""The commands, as their users run them."""
