"""What the tests stand on: real router processes, scripted models, deadlines."""
