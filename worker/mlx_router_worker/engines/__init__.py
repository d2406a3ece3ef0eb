"""The engines: one module for each kind of model. Apart from ``fake``, they and ``generation`` alone import mlx."""
