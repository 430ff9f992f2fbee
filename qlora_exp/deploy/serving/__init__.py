"""Answer requests of OpenAI's clients, and show how other servers are started with the same model."""
