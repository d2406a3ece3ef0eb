"""Models that come, are made, copied and removed: what the routes, the commands and downloads on demand share."""
