"""containerd's calls as typed values: the path on the wire, what is asked, what is answered.

Used in place of generated service stubs, which carry no types. A test holds each row against the
service definitions in `protos/containerd`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from reconciler.executor.containerd.generated import (
    containers_pb2 as containers,
)
from reconciler.executor.containerd.generated import (
    content_pb2 as content,
)
from reconciler.executor.containerd.generated import (
    diff_pb2 as diff,
)
from reconciler.executor.containerd.generated import (
    events_pb2 as events,
)
from reconciler.executor.containerd.generated import (
    images_pb2 as images,
)
from reconciler.executor.containerd.generated import (
    leases_pb2 as leases,
)
from reconciler.executor.containerd.generated import (
    namespaces_pb2 as namespaces,
)
from reconciler.executor.containerd.generated import (
    snapshots_pb2 as snapshots,
)
from reconciler.executor.containerd.generated import (
    tasks_pb2 as tasks,
)
from reconciler.executor.containerd.generated import (
    version_pb2 as version,
)

Ask = TypeVar("Ask", bound=Message)
Answer = TypeVar("Answer", bound=Message)


@dataclass(frozen=True)
class Method(Generic[Ask, Answer]):
    """One call: `service` in full, `name`, and the messages either way."""

    service: str
    name: str
    ask: type[Ask]
    answer: type[Answer]

    @property
    def path(self) -> str:
        """The HTTP/2 path gRPC calls."""
        return f"/{self.service}/{self.name}"


_CONTAINERS = "containerd.services.containers.v1.Containers"
_CONTENT = "containerd.services.content.v1.Content"
_IMAGES = "containerd.services.images.v1.Images"
_LEASES = "containerd.services.leases.v1.Leases"
_NAMESPACES = "containerd.services.namespaces.v1.Namespaces"
_SNAPSHOTS = "containerd.services.snapshots.v1.Snapshots"
_TASKS = "containerd.services.tasks.v1.Tasks"

VERSION = Method(
    "containerd.services.version.v1.Version", "Version", Empty, version.VersionResponse
)

NAMESPACE_CREATE = Method(
    _NAMESPACES, "Create", namespaces.CreateNamespaceRequest, namespaces.CreateNamespaceResponse
)
NAMESPACE_DELETE = Method(_NAMESPACES, "Delete", namespaces.DeleteNamespaceRequest, Empty)

LEASE_CREATE = Method(_LEASES, "Create", leases.CreateRequest, leases.CreateResponse)
LEASE_DELETE = Method(_LEASES, "Delete", leases.DeleteRequest, Empty)
LEASE_ADD = Method(_LEASES, "AddResource", leases.AddResourceRequest, Empty)
LEASE_LIST = Method(_LEASES, "List", leases.ListRequest, leases.ListResponse)

CONTENT_INFO = Method(_CONTENT, "Info", content.InfoRequest, content.InfoResponse)
CONTENT_UPDATE = Method(_CONTENT, "Update", content.UpdateRequest, content.UpdateResponse)
CONTENT_LIST = Method(_CONTENT, "List", content.ListContentRequest, content.ListContentResponse)
CONTENT_READ = Method(_CONTENT, "Read", content.ReadContentRequest, content.ReadContentResponse)
CONTENT_INGESTS = Method(
    _CONTENT, "ListStatuses", content.ListStatusesRequest, content.ListStatusesResponse
)
CONTENT_WRITE = Method(_CONTENT, "Write", content.WriteContentRequest, content.WriteContentResponse)
CONTENT_ABORT = Method(_CONTENT, "Abort", content.AbortRequest, Empty)

IMAGE_GET = Method(_IMAGES, "Get", images.GetImageRequest, images.GetImageResponse)
IMAGE_LIST = Method(_IMAGES, "List", images.ListImagesRequest, images.ListImagesResponse)
IMAGE_CREATE = Method(_IMAGES, "Create", images.CreateImageRequest, images.CreateImageResponse)
IMAGE_UPDATE = Method(_IMAGES, "Update", images.UpdateImageRequest, images.UpdateImageResponse)
IMAGE_DELETE = Method(_IMAGES, "Delete", images.DeleteImageRequest, Empty)

SNAPSHOT_PREPARE = Method(
    _SNAPSHOTS, "Prepare", snapshots.PrepareSnapshotRequest, snapshots.PrepareSnapshotResponse
)
SNAPSHOT_MOUNTS = Method(_SNAPSHOTS, "Mounts", snapshots.MountsRequest, snapshots.MountsResponse)
SNAPSHOT_COMMIT = Method(_SNAPSHOTS, "Commit", snapshots.CommitSnapshotRequest, Empty)
SNAPSHOT_REMOVE = Method(_SNAPSHOTS, "Remove", snapshots.RemoveSnapshotRequest, Empty)
SNAPSHOT_STAT = Method(
    _SNAPSHOTS, "Stat", snapshots.StatSnapshotRequest, snapshots.StatSnapshotResponse
)
SNAPSHOT_LIST = Method(
    _SNAPSHOTS, "List", snapshots.ListSnapshotsRequest, snapshots.ListSnapshotsResponse
)

DIFF_APPLY = Method(
    "containerd.services.diff.v1.Diff", "Apply", diff.ApplyRequest, diff.ApplyResponse
)

CONTAINER_GET = Method(
    _CONTAINERS, "Get", containers.GetContainerRequest, containers.GetContainerResponse
)
CONTAINER_LIST = Method(
    _CONTAINERS, "List", containers.ListContainersRequest, containers.ListContainersResponse
)
CONTAINER_CREATE = Method(
    _CONTAINERS, "Create", containers.CreateContainerRequest, containers.CreateContainerResponse
)
CONTAINER_DELETE = Method(_CONTAINERS, "Delete", containers.DeleteContainerRequest, Empty)

TASK_CREATE = Method(_TASKS, "Create", tasks.CreateTaskRequest, tasks.CreateTaskResponse)
TASK_START = Method(_TASKS, "Start", tasks.StartRequest, tasks.StartResponse)
TASK_DELETE = Method(_TASKS, "Delete", tasks.DeleteTaskRequest, tasks.DeleteResponse)
TASK_DELETE_EXEC = Method(_TASKS, "DeleteProcess", tasks.DeleteProcessRequest, tasks.DeleteResponse)
TASK_GET = Method(_TASKS, "Get", tasks.GetRequest, tasks.GetResponse)
TASK_LIST = Method(_TASKS, "List", tasks.ListTasksRequest, tasks.ListTasksResponse)
TASK_KILL = Method(_TASKS, "Kill", tasks.KillRequest, Empty)
TASK_EXEC = Method(_TASKS, "Exec", tasks.ExecProcessRequest, Empty)
TASK_METRICS = Method(_TASKS, "Metrics", tasks.MetricsRequest, tasks.MetricsResponse)
TASK_WAIT = Method(_TASKS, "Wait", tasks.WaitRequest, tasks.WaitResponse)

EVENT_SUBSCRIBE = Method(
    "containerd.services.events.v1.Events", "Subscribe", events.SubscribeRequest, events.Envelope
)
