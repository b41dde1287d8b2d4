"""Messages generated from protos/containerd: run protos/generate.py."""
