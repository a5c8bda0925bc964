"""The blocks of the promotion flows: the registry's database, the artifact store, and the servers."""

from __future__ import annotations

from pathlib import Path

from prefect.blocks.core import Block
from pydantic import Field, SecretStr

from registry.database import Database
from registry.settings import Settings
from registry.store import ArtifactStore, open_store

DOCUMENT = "modelkeep"
"""The name under which each block is saved: one a type."""


class RegistryDatabase(Block):
    """The database that holds models, routes, promotions and the audit trail."""

    _block_type_name = "modelkeep registry"
    _block_type_slug = "modelkeep-registry"
    _description = "The registry's database. Generated from the settings."

    url: SecretStr = Field(description="SQLAlchemy URL.")
    anchors: Path | None = Field(default=None, description="File in which heads of the audit chain are anchored.")
    pool_size: int = 5
    max_overflow: int = 10
    pool_timeout: float = 30.0
    pool_recycle: int = 3600

    @classmethod
    def from_settings(cls, settings: Settings) -> RegistryDatabase:
        return cls(
            url=SecretStr(settings.database_url),
            anchors=settings.home / "audit.anchors",
            pool_size=settings.database.pool_size,
            max_overflow=settings.database.max_overflow,
            pool_timeout=settings.database.pool_timeout_seconds,
            pool_recycle=int(settings.database.pool_recycle_seconds),
        )

    def connect(self) -> Database:
        """The database, brought to this release's schema. Raises UnavailableError, StorageError."""
        pool = self.model_dump(include={"pool_size", "max_overflow", "pool_timeout", "pool_recycle"})
        database = Database(self.url.get_secret_value(), anchors=self.anchors, pool=pool)
        database.prepare()
        return database


class Artifacts(Block):
    """Where the files of the versions are kept, by their SHA-256."""

    _block_type_name = "modelkeep artifacts"
    _block_type_slug = "modelkeep-artifacts"
    _description = "The artifact store. Generated from the settings."

    location: str = Field(description="A directory.")
    cache: Path = Field(description="A folder for artifacts of several files.")

    @classmethod
    def from_settings(cls, settings: Settings) -> Artifacts:
        return cls(location=settings.artifacts, cache=settings.home / "cache")

    def connect(self) -> ArtifactStore:
        return open_store(self.location)


class Servers(Block):
    """The inference servers, for what must work without the registry. With it, the replicas' own rows say where they are."""

    _block_type_name = "modelkeep servers"
    _block_type_slug = "modelkeep-servers"
    _description = "Addresses of the inference servers. Generated from the settings."

    environment: str
    addresses: list[str]

    @classmethod
    def from_settings(cls, settings: Settings) -> Servers:
        return cls(environment=settings.environment, addresses=settings.servers)


BLOCKS: tuple[type[RegistryDatabase] | type[Artifacts] | type[Servers], ...] = (RegistryDatabase, Artifacts, Servers)


def save_all(settings: Settings) -> list[str]:
    """Write every block to Prefect's server, over what is there. Returns their slugs."""
    saved = []
    for block in BLOCKS:
        block.register_type_and_schema()
        block.from_settings(settings).save(DOCUMENT, overwrite=True)
        saved.append(f"{block.get_block_type_slug()}/{DOCUMENT}")
    return saved
