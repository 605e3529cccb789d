"""The part of the W&B server on loopback that keeps artifacts: content-addressed, a version for each digest."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field
from typing import Any

INPUT = (
    *("entityName", "projectName", "runName", "description", "artifactTypeName", "artifactCollectionName", "digest"),
    *("digestAlgorithm", "aliases", "metadata", "clientID", "sequenceClientID", "historyStep", "enableDigestDeduplication"),
)


@dataclass
class Artifact:
    """One version."""

    id: str
    name: str
    type: str
    digest: str
    metadata: dict[str, Any]
    aliases: list[str] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)
    committed: bool = False


NOTHING = Artifact("", "", "", "", {})


def answer(kept: dict[str, Artifact], url: str, operation: str, variables: dict[str, Any]) -> dict[str, Any] | None:
    """What the server says to an operation about artifacts; None if it is about something else."""
    told = variables.get("input") or variables  # 0.21 has them without that
    match operation:
        case "InputFields":  # of 0.21: which fields the server knows
            return {"TypeInfo": {"inputFields": [{"name": name} for name in INPUT]}}
        case "ArtifactType":
            name = str(variables.get("name", "")).partition(":")[0]
            found = next((one for one in kept.values() if one.name == name), None)
            return {"project": {"artifact": found and {"artifactType": {"name": found.type}}}}
        case "CreateArtifact":
            made = next((one for one in kept.values() if one.digest == told["digest"]), None)
            if made is None:
                metadata = json.loads(told.get("metadata") or "{}")
                name = (told.get("artifactCollectionNames") or [told.get("artifactCollectionName")])[0]
                number = base64.b64encode(f"Artifact:{len(kept):03}".encode()).decode()  # 0.21 decodes it
                made = Artifact(number, name, told["artifactTypeName"], told["digest"], metadata)
                kept[made.id] = made
            made.aliases += [one["alias"] for one in told.get("aliases") or []]
            state = "COMMITTED" if made.committed else "PENDING"
            about = {"id": made.id, "state": state, "artifactSequence": {"latestArtifact": None}}
            return {"createArtifact": {"artifact": about}}
        case "CreateArtifactManifest":
            file = {"id": "f", "uploadUrl": f"{url}/artifact/{variables['artifactID']}/manifest", "uploadHeaders": []}
            manifest = {"id": variables["artifactID"], "file": file if variables.get("includeUpload") else {"id": "f"}}
            return {"createArtifactManifest": {"artifactManifest": manifest}}
        case "UpdateArtifactManifest":
            number = variables["artifactManifestID"]
            file = {"id": "f", "uploadUrl": f"{url}/artifact/{number}/manifest", "uploadHeaders": []}
            return {"updateArtifactManifest": {"artifactManifest": {"id": number, "file": file}}}
        case "CreateArtifactFiles":
            nodes = [
                {
                    "storagePath": f"{one['artifactID']}/{one['name']}",
                    "uploadUrl": f"{url}/artifact/{one['artifactID']}/files/{one['name']}",
                    "uploadHeaders": [],
                    "uploadMultipartUrls": None,
                    "artifact": {"id": one["artifactID"]},
                }
                for one in told["artifactFiles"]
            ]
            return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}
        case "ProbeServerArtifact":  # of 0.21: which fields the server knows of one that is asked for
            return {"ArtifactInfoType": {"fields": [{"name": name} for name in _told(NOTHING, url)]}}
        case "ArtifactByID" | "ArtifactByIDShort":  # the latter of 0.21
            return {"artifact": _told(kept[variables["id"]], url)}
        case "CommitArtifact":
            kept[variables["artifactID"]].committed = True
            return {"commitArtifact": {"artifact": {"id": variables["artifactID"], "digest": "x"}}}
    return None


def _told(made: Artifact, url: str) -> dict[str, Any]:
    """A version as the client asks for it after its upload."""
    project = {"id": "p", "internalId": "1", "name": "project", "entityName": "entity", "entity": {"name": "entity"}}
    return {
        "__typename": "Artifact", "id": made.id, "artifactType": {"name": made.type}, "metadata": json.dumps(made.metadata),
        "artifactSequence": {"__typename": "ArtifactSequence", "id": "s", "name": made.name, "project": project},
        "state": "COMMITTED" if made.committed else "PENDING", "size": sum(map(len, made.files.values())),
        "digest": made.digest, "fileCount": len(made.files), "createdAt": "2026-01-01T00:00:00", "updatedAt": None,
        "versionIndex": 0, "commitHash": "c", "historyStep": None, "description": None, "tags": [], "aliases": [],
        "ttlDurationSeconds": -2, "ttlIsInherited": True,
        "currentManifest": {"file": {"directUrl": f"{url}/artifact/{made.id}/manifest"}},
    }  # fmt: skip


def take(kept: dict[str, Artifact], parts: list[str], body: bytes) -> None:
    """A file that arrives at ``artifact/ID/manifest`` or ``artifact/ID/files/NAME``."""
    made = kept[parts[1]]
    if parts[2] == "manifest":
        made.manifest = json.loads(body)
    else:
        made.files["/".join(parts[3:])] = body
