"""Apache Iceberg's reference REST catalog (`RESTCatalogServer`) on SQLite, with a warehouse on files or S3."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from services.process import Process, cache_folder, free_ports, http_ok
from services.s3 import ACCESS_KEY, REGION, SECRET_KEY, S3Server


class RestCatalog:
    """An Iceberg REST endpoint. It hands out no storage settings: clients bring their own."""

    def __init__(self, folder: Path, s3: S3Server | None = None, port: int | None = None) -> None:
        self.folder = folder
        self.s3 = s3
        self.port = port or free_ports(1)[0]
        self.uri = f"http://127.0.0.1:{self.port}"
        folder.mkdir(parents=True)
        (folder / "tmp").mkdir()
        self.warehouse = f"s3://{s3.bucket}/wh" if s3 else f"file://{folder}/wh"

    def __enter__(self) -> RestCatalog:
        # the server turns CATALOG_A__B_C into the property a-b.c
        environment = {
            "CATALOG_REST_PORT": str(self.port),
            "CATALOG_WAREHOUSE": self.warehouse,
            "CATALOG_URI": f"jdbc:sqlite:{self.folder}/catalog.db",
        }
        if self.s3:
            environment |= {
                "CATALOG_IO__IMPL": "org.apache.iceberg.aws.s3.S3FileIO",
                "CATALOG_S3_ENDPOINT": self.s3.endpoint,
                "CATALOG_S3_PATH__STYLE__ACCESS": "true",
                "CATALOG_S3_ACCESS__KEY__ID": ACCESS_KEY,
                "CATALOG_S3_SECRET__ACCESS__KEY": SECRET_KEY,
                "CATALOG_CLIENT_REGION": REGION,
                "AWS_REGION": REGION,
            }
        self._process = Process(
            "rest-catalog",
            [
                "java", "-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1",
                f"-Djava.io.tmpdir={self.folder}/tmp", "-cp", cache_folder() / "rest-catalog" / "*",
                "org.apache.iceberg.rest.RESTCatalogServer",
            ],
            self.folder,
            ready=lambda _: http_ok(f"{self.uri}/v1/config"),
            environment=environment,
        )  # fmt: skip
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.stop()
