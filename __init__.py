"""pocketslm: put small language models on phones and edge boards."""

__version__ = "0.1.0"
