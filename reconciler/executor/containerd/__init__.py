"""The container runtime's door: images, containers and their network, over containerd's gRPC.

Nothing above this package sees a containerd message or a gRPC error: calls answer with frozen
structs and fail with `RuntimeFailed` (`client`) or `PullFailed` (`registry`).
"""

import os

# gRPC reads this once, at its first import: with fork support on, every child process that asyncio
# starts (nft, git) would stop the event loop's gRPC threads first, and sometimes hang there.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
