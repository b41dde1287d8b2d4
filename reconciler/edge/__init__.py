"""State to traffic, on every node: routes and addresses for Envoy, names for DNS."""
