"""An ensemble behind OpenAI's API, with its uncertainty and a playground. It needs the extra `renyi[serve]`.

Read in this order: `engine.py` (what the server asks of whatever computes answers), `answers.py` (from a request to an
engine's requests, and from tokens to text), `app.py` (the routes), `batching.py` (our engine).
"""
