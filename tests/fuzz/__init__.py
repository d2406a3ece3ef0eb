"""Random and nearly right requests on every route, for minutes."""
