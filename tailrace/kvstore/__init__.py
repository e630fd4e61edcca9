"""The store of KV blocks: a tier of CPU memory over a tier on a disk. No sockets, no torch."""
