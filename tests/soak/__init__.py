"""The chaos run (`make soak`): everything that can go wrong, for minutes, and then the books are checked."""
