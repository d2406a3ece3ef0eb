"""Work that takes minutes, in processes of its own: the router's side of it, and the job that downloads."""
