"""Floor 3: from requests to hooks."""
