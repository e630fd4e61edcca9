"""What a KV block is, what it is called, and who owns it. No torch, no sockets."""
