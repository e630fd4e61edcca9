"""The engine: turns StepPlans into tokens. No sockets, no asyncio, no services."""
