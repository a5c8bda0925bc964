"""Connections and what stands around every request: the HTTP protocol, heads, bodies, TLS, CORS, compression, the access log."""
