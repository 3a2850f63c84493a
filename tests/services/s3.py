"""versitygw: a real S3 server whose objects are plain files."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from services.process import Process, cache_folder, free_ports, http_ok

ACCESS_KEY, SECRET_KEY, REGION = "testkey", "testsecret-not-a-secret", "us-east-1"


class S3Server:
    """An S3 endpoint with one bucket, `warehouse`."""

    bucket = "warehouse"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_ports(1)[0]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        (folder / "data" / self.bucket).mkdir(parents=True)
        (folder / "meta").mkdir()

    def __enter__(self) -> S3Server:
        self._process = Process(
            "versitygw",
            [
                cache_folder() / "versitygw" / "versitygw",
                "--quiet", "--port", f"127.0.0.1:{self.port}", "--region", REGION, "--health", "/health",
                "posix", "--sidecar", self.folder / "meta", self.folder / "data",
            ],
            self.folder,
            ready=lambda _: http_ok(f"{self.endpoint}/health"),
            environment={"ROOT_ACCESS_KEY": ACCESS_KEY, "ROOT_SECRET_KEY": SECRET_KEY},
        )  # fmt: skip
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.stop()

    def properties(self) -> dict[str, str]:
        """What a client brings, under the names of pyiceberg and the Iceberg REST specification."""
        return {
            "s3.endpoint": self.endpoint,
            "s3.access-key-id": ACCESS_KEY,
            "s3.secret-access-key": SECRET_KEY,
            "s3.region": REGION,
            "s3.path-style-access": "true",
        }
