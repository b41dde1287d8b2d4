"""Messages generated from protos/etcd: run protos/generate.py."""
