"""The S3 server of the tests does what the other tests rely on."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import uuid
from typing import Any

import pytest


def refused(status: int, call: Any, **arguments: Any) -> None:
    from botocore.exceptions import ClientError

    with pytest.raises(ClientError) as caught:
        call(**arguments)
    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == status


def where(s3: Any) -> dict[str, str]:
    return {"Bucket": s3.bucket, "Key": uuid.uuid4().hex}


def test_answers(s3: Any) -> None:
    client, place = s3.client(), where(s3)
    client.put_object(**place, Body=b"0123456789")
    assert client.get_object(**place)["Body"].read() == b"0123456789"
    assert client.get_object(**place, Range="bytes=-3")["Body"].read() == b"789"
    listed = client.list_objects_v2(Bucket=s3.bucket, Prefix=place["Key"])["Contents"]
    assert [entry["Key"] for entry in listed] == [place["Key"]]
    client.delete_object(**place)
    refused(404, client.get_object, **place)


def test_wrong_secret_and_unknown_key_are_refused(s3: Any) -> None:
    admin = s3.identities[0]
    for wrong in (dataclasses.replace(admin, secret_key="x"), dataclasses.replace(admin, access_key="x")):
        refused(403, s3.client(wrong).list_objects_v2, Bucket=s3.bucket)
        refused(403, s3.client(wrong).put_object, **where(s3), Body=b"1")


def test_put_only_user_can_put_and_nothing_else(s3: Any) -> None:
    writer, place = s3.client(s3.identities[1]), where(s3)
    writer.put_object(**place, Body=b"1")
    assert s3.client().get_object(**place)["Body"].read() == b"1"
    refused(403, writer.get_object, **place)
    refused(403, writer.list_objects_v2, Bucket=s3.bucket)
    refused(403, writer.delete_object, **place)
    refused(403, writer.head_object, **place)
    refused(403, writer.create_bucket, Bucket="another")
    refused(412, writer.put_object, **place, Body=b"2", IfNoneMatch="*")


def test_conditional_puts(s3: Any) -> None:
    client, place = s3.client(), where(s3)
    tag = client.put_object(**place, Body=b"1", IfNoneMatch="*")["ETag"]
    refused(412, client.put_object, **place, Body=b"2", IfNoneMatch="*")
    refused(412, client.put_object, **place, Body=b"2", IfMatch='"0"')
    client.put_object(**place, Body=b"3", IfMatch=tag)
    assert client.get_object(**place)["Body"].read() == b"3"


def test_requests_are_counted(s3: Any) -> None:
    client, place = s3.client(), where(s3)
    before = s3.request_counts()
    client.put_object(**place, Body=b"12")
    client.put_object(**place, Body=b"12")
    client.get_object(**place)["Body"].read()
    client.get_object(**place, Range="bytes=0-0")["Body"].read()
    refused(412, client.put_object, **place, Body=b"1", IfNoneMatch="*")
    refused(404, client.get_object, **where(s3))
    client.list_objects_v2(Bucket=s3.bucket, Prefix=place["Key"])
    after = s3.request_counts()
    grown = {key: after[key] - before.get(key, 0) for key in after if after[key] != before.get(key, 0)}
    assert grown == {
        (200, "PUT"): 2,
        (200, "GET"): 1,
        (206, "GET"): 1,
        (412, "PUT"): 1,
        (404, "GET"): 1,
        (200, "LIST"): 1,
    }


def test_environment_reaches_the_server(s3: Any, bucket_url: str) -> None:
    code = "import sys, s3fs; s3fs.S3FileSystem().pipe_file(sys.argv[1], b'from a child')"
    subprocess.run([sys.executable, "-c", code, f"{bucket_url}/x"], check=True)
    key = f"{bucket_url}/x".removeprefix(f"s3://{s3.bucket}/")
    assert s3.client().get_object(Bucket=s3.bucket, Key=key)["Body"].read() == b"from a child"


def test_stop_and_restart_keep_the_data(s3_session: Any) -> None:
    """On a server of its own: others of the session go on using theirs."""
    from botocore.exceptions import EndpointConnectionError

    with sys.modules["s3_server"].s3_server() as server:
        assert server.endpoint != s3_session.endpoint
        place, folder, child = where(server), server.folder, server.process
        server.client().put_object(**place, Body=b"kept")
        server.stop()
        assert child.poll() is not None
        with pytest.raises(EndpointConnectionError):
            server.client().get_object(**place)
        server.restart()
        assert server.client().get_object(**place)["Body"].read() == b"kept"
        child = server.process
    assert child.poll() is not None
    assert not folder.exists()
