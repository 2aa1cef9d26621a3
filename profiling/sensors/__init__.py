"""What a device tells about itself: pure readers over the text of its files and commands."""
