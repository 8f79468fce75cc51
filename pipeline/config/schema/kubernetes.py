"""Keys of kind kubernetes: what the pods of a run are made of."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from pipeline.config.schema.section import Section

ObjectName = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=253)]
Quantity = Annotated[str, Field(pattern=r"^[1-9][0-9]*(\.[0-9]+)?([kMGTPE]|[KMGTPE]i)?$")]
AbsolutePath = Annotated[str, Field(pattern=r"^(/[A-Za-z0-9._-]+)+$")]


class ClaimConfig(Section):
    """A PersistentVolumeClaim that exists."""

    name: ObjectName = Field(description="Name of the PersistentVolumeClaim.")
    path: AbsolutePath = Field(description="Folder where the pods see its content.")


class ClaimsConfig(Section):
    """What the pods see besides their image."""

    data: ClaimConfig | None = Field(
        None, description="Claim with the images; it is only read. Default: none."
    )
    runs: ClaimConfig | None = Field(
        None,
        description="Claim for the run directories, which pods on several machines can write "
        "(ReadWriteMany).",
    )


class TolerationConfig(Section):
    """A taint of machines that the pods tolerate, in Kubernetes' words."""

    key: str = Field("", description="Key of the taint; empty: every taint.")
    operator: Literal["Exists", "Equal"] = Field(
        "Exists", description="'Exists': whatever the value. 'Equal': the value below."
    )
    value: str = Field("", description="Value of the taint.")
    effect: Literal["", "NoSchedule", "PreferNoSchedule", "NoExecute"] = Field(
        "", description="Effect of the taint; empty: every effect."
    )


class KubernetesConfig(Section):
    """Kind kubernetes: a RayJob of the KubeRay operator."""

    context: str = Field("", description="Context of the kubeconfig file; empty: its current one.")
    namespace: Annotated[str, Field(pattern=r"^([a-z0-9]([-a-z0-9]*[a-z0-9])?)?$")] = Field(
        "", description="Namespace of the run; empty: that of the context."
    )
    # That it has a tag is checked later: a message says more than a pattern.
    image: str = Field("", description="Image of the pods, with a tag or a digest.")
    pull_policy: Literal["IfNotPresent", "Always", "Never"] = Field(
        "IfNotPresent", description="When a machine pulls the image."
    )
    image_pull_secrets: list[ObjectName] = Field(
        [], description="Names of Secrets with the credentials of the image's registry."
    )
    # Required for this kind. A default would leave the decoding of images short of cores, or no
    # machine would have that many.
    cpus: PositiveInt | None = Field(None, description="CPU cores of each worker pod.")
    memory: Quantity | None = Field(None, description="Memory of each worker pod, such as 512Gi.")
    # Device plugins of other makers have names of their own, such as amd.com/gpu.
    gpu_resource: str = Field(
        "nvidia.com/gpu", description="Name of the resource that a GPU is asked for with."
    )
    claims: ClaimsConfig = Field(ClaimsConfig(), description="Volumes of the pods.")
    # Names only: a value here would be in manifests, logs and the record of the run.
    environment_from: list[ObjectName] = Field(
        [],
        description="Names of Secrets whose entries become variables of the pods: credentials of "
        "a store of images.",
    )
    queue: Annotated[str, Field(pattern=r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?)?$")] = Field(
        "", description="LocalQueue of Kueue in which the run waits; empty: none."
    )
    priority_class: str = Field("", description="PriorityClass of the pods; empty: the default.")
    node_selector: dict[str, str] = Field(
        {}, description="Labels that a machine must have to get a pod."
    )
    tolerations: list[TolerationConfig] = Field(
        [], description="Taints of machines that the pods tolerate."
    )
    # Free: Volcano and YuniKorn choose jobs by labels, RDMA networks are attached by annotations.
    labels: dict[str, str] = Field(
        {}, description="Further labels of the RayJob and the pods: for a scheduler."
    )
    annotations: dict[str, str] = Field(
        {}, description="Further annotations of the RayJob and the pods: for networks."
    )
