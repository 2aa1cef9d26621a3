"""``pocketslm serve``: models behind OpenAI's interface. Needs the extra ``serve``."""
