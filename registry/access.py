"""The sections of the settings that say who reaches a server, and how: address and limits, https, keys, origins, rates."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from registry import rates
from registry.errors import UsageError
from registry.sections import Section, check_url


class ServerSection(Section):
    host: str = Field("127.0.0.1", min_length=1, description="Address to listen at.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen at; 0 takes any free one.")
    address: str | None = Field(
        default=None, description="URL by which flows on other machines reach this server; absent: host and port."
    )
    workers: int = Field(1, ge=1, description="Processes: one, since a server has one device.")
    drain_seconds: float = Field(30.0, ge=0, description="Time that requests in flight get when the server stops.")
    request_timeout_seconds: float = Field(30.0, gt=0, description="Longest that a request may take.")
    max_body_bytes: int = Field(10_000_000, gt=0, description="Largest request body.")
    max_receiving_mb: int = Field(
        64,
        ge=0,
        description="Memory for bodies that are on their way and whose requests have no place yet; beyond it a request takes its place "
        "while it is still sending.",
    )
    threads: int = Field(1, ge=1, description="Threads inside one run of a model.")
    max_connections: int = Field(
        2000,
        ge=1,
        description="Connections at a time; the next are told to come again. Fewer where the system gives fewer descriptors.",
    )
    max_header_bytes: int = Field(32768, ge=1024, le=200_000, description="Request line and headers together.")
    max_headers: int = Field(100, ge=10, le=10_000, description="Headers of one request.")
    max_url_bytes: int = Field(8192, ge=256, le=200_000, description="Longest path with its query.")
    keep_alive_seconds: float = Field(75.0, gt=0, description="A connection that asks nothing is closed after so long.")
    write_timeout_seconds: float = Field(
        30.0, gt=0, description="A client that takes nothing of its answer for so long is cut off."
    )
    response_time_header: bool = Field(True, description="Send X-Response-Time, in seconds, with every answer.")
    tls_certificate: Path | None = Field(
        default=None, description="PEM file of the certificate and its chain: the server then speaks https alone."
    )
    tls_key: Path | None = Field(default=None, description="PEM file of its key, without a password.")
    tls_client_ca: Path | None = Field(
        default=None, description="PEM file of a CA: who connects must show a certificate of it."
    )

    @model_validator(mode="after")
    def _tls_whole(self) -> ServerSection:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key go together: give both or neither")
        if self.tls_client_ca is not None and self.tls_certificate is None:
            raise ValueError("tls_client_ca needs tls_certificate and tls_key")
        if self.tls_certificate is not None and self.address is not None and not self.address.startswith("https://"):
            raise ValueError(f"address = {self.address!r}: with tls_certificate the server is reached by https://")
        return self

    @field_validator("address")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        return value if value is None else check_url(value, ("http", "https"), "http://box-1:8000").rstrip("/")


class ClientSection(Section):
    """How commands and flows reach servers by https."""

    ca: Path | None = Field(
        default=None, description="PEM file of the CA of the servers; absent: the system's own CAs."
    )
    certificate: Path | None = Field(default=None, description="PEM file to show servers that ask for a certificate.")
    key: Path | None = Field(default=None, description="PEM file of its key.")

    @model_validator(mode="after")
    def _whole(self) -> ClientSection:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key go together: give both or neither")
        return self


class SecuritySection(Section):
    cors_origins: list[str] = Field(default=[], description="Web origins that may call the API from a browser; none.")
    require_keys: bool = Field(
        False,
        description="Ask for an API key on this machine too: set it where a proxy passes others on to this address.",
    )
    allow_unauthenticated: bool = Field(
        False,
        description="Ask for no API key, also beyond this machine: something in front guards it.",
    )
    rate_limit: str = Field(
        "60/minute",
        description="Inference requests of one API key that has no rate of its own: number/second|minute|hour|day, or none.",
    )

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, origins: list[str]) -> list[str]:
        for origin in origins:
            if origin != "*":
                if origin == "null":
                    raise ValueError("'null' is what any sandboxed page sends: name the origins")
                check_url(origin, ("http", "https"), "https://app.example.org")
                if urlsplit(origin).path or urlsplit(origin).query:
                    raise ValueError(f"{origin!r}: an origin ends after the host and port")
        return origins

    @model_validator(mode="after")
    def _one_way(self) -> SecuritySection:
        if self.require_keys and self.allow_unauthenticated:
            raise ValueError("require_keys and allow_unauthenticated are both true: keys are asked for or they are not")
        if "*" in self.cors_origins and not self.allow_unauthenticated:
            raise ValueError(
                "cors_origins = '*' lets every page of the web act by the browser of whoever may: name the origins "
                "(https://app.example.org); '*' is for servers whose allow_unauthenticated is true"
            )
        return self

    @field_validator("rate_limit")
    @classmethod
    def _rate(cls, value: str) -> str:
        try:
            return rates.written(value)
        except UsageError:
            raise ValueError(
                "must be a number above 0 and a unit, as in 60/minute (second, minute, hour or day), or none"
            ) from None

    @property
    def rate(self) -> rates.Rate | None:
        """`rate_limit`; None where there is no limit."""
        return rates.parse(self.rate_limit)
