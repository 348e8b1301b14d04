"""What tests share: small networks and data, dense references, and what to skip where."""
