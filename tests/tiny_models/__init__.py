"""Small MLX models made by the project itself: the bundled demo model and random-weight models.

``script`` is the demo model's script and the oracle of every test that talks to it; ``tokenizer`` and ``weights``
build the files; ``train_demo`` trains the demo model (``make demo-model``); ``random_model`` makes models of any
size for swap, memory and load tests. Everything is seeded and needs no network.
"""
