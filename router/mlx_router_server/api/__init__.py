"""Routes: parse, acquire, stream, render. What an API looks like is in ``dialects``, what happens to models is not."""
