"""What router and worker agree on: messages, the canonical generation request, its events, and error codes."""
