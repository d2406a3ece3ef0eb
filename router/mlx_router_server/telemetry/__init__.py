"""What the router tells about itself."""
