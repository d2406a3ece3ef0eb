"""The page of the router in a real browser; run by `make test-ui`, which installs what that needs."""
