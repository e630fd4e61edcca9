"""What prefill and decode workers share (the engine's thread, the gateways attached to it, joining and lending), and
what makes a store a member like them."""
