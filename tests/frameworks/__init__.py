"""The same application in every framework, and what becomes of it in the middleware."""
