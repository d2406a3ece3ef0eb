"""Who may use the server: keys, what they allow, and where they are kept."""
