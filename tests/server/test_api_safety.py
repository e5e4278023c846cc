"""What the REST interface refuses: foreign pages, unknown trainings, files that are not listed."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote, urlsplit

import pytest
from lora2_pack.tests.server.asking import ask, check_error, get, in_background, of_name, until
from lora2_pack.tests.server.studio import Studio

STRANGER = "no-such-training-00000"


@pytest.fixture(scope="module")
def trained(studio: Studio) -> str:
    """The id of a training that is over and has pictures of step 4."""
    studio.run(in_background("api/safe", 4))
    return until(lambda: of_name(studio.server, "safe", "finished"))["id"]


@pytest.mark.parametrize(
    "path",
    ["", "/report", "/samples/1/0", "/samples/99999999/0"],
)
def test_unknown_trainings(studio: Studio, path: str):
    check_error(ask(studio.server, f"/lora2/jobs/{STRANGER}{path}"), 404)


def test_ids_are_no_paths(studio: Studio, trained: str):
    secret = studio.server.directory / "user" / "lora2" / "secret-secret.json"
    secret.write_text("{}")
    for id in ("..%2Fsecret-secret", "%2e%2e%2fsecret-secret", "..", "%00", "a" * 5000):
        status, answer = ask(studio.server, f"/lora2/jobs/{id}")
        assert status in (400, 404), answer
        assert not isinstance(answer, dict) or answer.keys() == {"error"}
    for what in ("cancel", "pause", "resume"):
        check_error(ask(studio.server, f"/lora2/jobs/{STRANGER}/{what}", "POST"), 404)
        check_error(ask(studio.server, f"/lora2/jobs/..%2Fsecret-secret/{what}", "POST"), 404)
    check_error(ask(studio.server, f"/lora2/jobs/{trained}/explode", "POST"), 404)
    assert secret.exists()


@pytest.mark.parametrize(
    ("place", "status"),
    [
        ("4/2", 404), ("5/0", 404), ("0/0", 404), ("4/-1", 400), ("x/0", 400), ("4/0.5", 400),
        ("99999999999999/0", 400), ("..%2F..%2Fx/0", 400), ("4/%D9%A3", 400),
    ],
)  # fmt: skip
def test_unknown_pictures(studio: Studio, trained: str, place: str, status: int):
    check_error(ask(studio.server, f"/lora2/jobs/{trained}/samples/{place}"), status)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "../../user/secret.safetensors",
        "..\\..\\user\\secret.safetensors",
        "api/../../../user/secret.safetensors",
        "/etc/passwd",
        "C:\\Windows\\win.ini",
        "\\\\host\\share\\x.safetensors",
        "x\0.safetensors",
        "a" * 3000,
        "nothing.safetensors",
        "notes.txt",
        "~/x.safetensors",
        "file:///etc/passwd",
    ],
)
def test_only_listed_files_are_read(studio: Studio, trained: str, name: str):
    job = get(studio.server, f"/lora2/jobs/{trained}", "job")
    data = (studio.loras / job["file"]).read_bytes()
    (studio.server.directory / "user" / "secret.safetensors").write_bytes(data)
    (studio.loras / "notes.txt").write_text("x")
    status = 404 if name in ("nothing.safetensors", "notes.txt", "~/x.safetensors") else 400
    if name.startswith("file:"):
        status = 404
    check_error(ask(studio.server, f"/lora2/inspect?name={quote(name, safe='')}"), status)
    check_error(ask(studio.server, "/lora2/inspect"), 400)


def test_the_absolute_path_of_a_listed_file_is_refused(studio: Studio, trained: str):
    job = get(studio.server, f"/lora2/jobs/{trained}", "job")
    path = quote(str((studio.loras / job["file"]).resolve()), safe="")
    check_error(ask(studio.server, f"/lora2/inspect?name={path}"), 400)


@pytest.mark.parametrize("content", [b"", b"no safetensors at all", b"\x08\0\0\0\0\0\0\0{}      "])
def test_what_is_no_lora_is_refused_without_its_folder(studio: Studio, content: bytes):
    (studio.loras / "api").mkdir(exist_ok=True)
    (studio.loras / "api" / "broken.safetensors").write_bytes(content)
    text = check_error(ask(studio.server, "/lora2/inspect?name=api%2Fbroken.safetensors"), 400)
    assert "broken.safetensors" in text and str(studio.loras) not in text


def _own(server: Any) -> str:
    return urlsplit(server.url).netloc


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": "null"},
        {"Origin": "http://evil.example", "Host": "studio.example:8188"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site", "Origin": "http://evil.example"},
    ],
)
def test_other_pages_change_nothing(studio: Studio, trained: str, headers: dict[str, str]):
    for what in ("cancel", "pause", "resume"):
        status, _ = ask(studio.server, f"/lora2/jobs/{trained}/{what}", "POST", **headers)
        assert status == 403


def test_comfyuis_own_page_and_scripts_may(studio: Studio, trained: str):
    own = _own(studio.server)
    for headers in (
        {},
        {"Origin": f"http://{own}"},
        {"Origin": f"http://{own}", "Sec_Fetch_Site": "same-origin"},
        {"Origin": "https://my.example", "Host": "lan.example", "X_Forwarded_Host": "my.example"},
    ):
        answer = ask(studio.server, f"/lora2/jobs/{trained}/pause", "POST", **headers)
        check_error(answer, 409)


@pytest.mark.parametrize(
    ("headers", "allowed", "foreign"),
    [
        ({}, None, False),
        ({"Host": "a:1", "Origin": "http://a:1"}, None, False),
        ({"Host": "A:1", "Origin": "http://a:1"}, None, False),
        ({"Host": "a:1", "Origin": "http://a:2"}, None, True),
        ({"Host": "a", "Origin": "http://a.evil.example"}, None, True),
        ({"Host": "a", "Origin": "http://["}, None, True),
        ({"Host": "a", "Origin": "http://[x]"}, None, True),
        ({"Host": "a", "Origin": "http://a\u2100.com"}, None, True),
        ({"Host": "a:1", "Origin": "http://b"}, "*", False),
        ({"Host": "a:1", "Origin": "http://b"}, "http://b", False),
        ({"Host": "a:1", "Origin": "http://c"}, "http://b", True),
        ({"Host": "a:1", "Origin": "http://a:1"}, "http://b", False),
        ({"Host": "proxied", "Origin": "https://a", "Sec-Fetch-Site": "same-origin"}, None, False),
        ({"Host": "a", "Sec-Fetch-Site": "none"}, None, False),
        ({"Host": "a", "Sec-Fetch-Site": "cross-site"}, "http://b", True),
    ],
)
def test_which_page_is_foreign(headers: dict[str, str], allowed: str | None, foreign: bool):
    """Also where ComfyUI does not look: beyond loopback, and with --enable-cors-header."""
    from lora2_pack.nodes.screen import routes

    assert routes.is_foreign(headers, allowed) is foreign


def test_without_a_server_there_is_nothing_to_offer():
    from lora2_pack.lora2_core.jobs.queue import JobQueue
    from lora2_pack.nodes.screen import routes

    routes.register(JobQueue())
    assert routes.prompt_running() is False


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/ada/ComfyUI/output/loras/a.safetensors is damaged.", "a.safetensors is damaged."),
        ("C:\\Users\\ada\\loras\\a.safetensors is gone", "a.safetensors is gone"),
        ("No such file: '/x/y/z.png'", "No such file: 'z.png'"),
        ("No such file: '/home/Ada Lovelace/my cats/z.png'", "No such file: 'z.png'"),
        ("D:\\My Models\\loras\\a b.safetensors is gone", "a b.safetensors is gone"),
        ("(/mnt/my disk/loras/x)", "(x)"),
        ("/mnt/my disk/loras/a.safetensors is full of x/y", "a.safetensors is full of x/y"),
        ("width / height / 2 (px)", "width / height / 2 (px)"),
        ("https://a.example/b and 3/4 of input/x", "https://a.example/b and 3/4 of input/x"),
        ("input_blocks.4.1/attn, loss 1e-3", "input_blocks.4.1/attn, loss 1e-3"),
    ],
)  # fmt: skip
def test_texts_name_no_folder_of_this_machine(text: str, shown: str):
    from lora2_pack.nodes.screen import listed_names

    assert listed_names.clean(text) == shown
