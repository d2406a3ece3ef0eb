"""Names to models: what can be asked for, found by content, held in memory. Never touches a weight."""
