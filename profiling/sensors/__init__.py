"""Read a device's sensors: pure functions over the text of its files and commands."""
