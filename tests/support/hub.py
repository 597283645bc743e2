"""
A stand-in for the Hugging Face Hub on this machine: the part of its HTTP interface that pushing and loading need.

It keeps what it is given in memory. What it is not made for it answers with 501 and remembers in `unanswered`. Of card
metadata it checks what the Hub documents of their form; whether names exist elsewhere it cannot know.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

USER, TOKEN = "tester", "hf_local_token"
# As in the `.gitattributes` with which the Hub starts a repository
LARGE_FILES = re.compile(r"\.(safetensors|bin|pt|pth|png|parquet)$|tfevents")


@dataclass
class Commit:
    message: str
    files: dict[str, bytes]

    @property
    def sha(self) -> str:
        return hashlib.sha1(repr((self.message, sorted(self.files.items()))).encode()).hexdigest()


@dataclass
class Repository:
    private: bool
    commits: list[Commit] = field(default_factory=lambda: [Commit("initial commit", {})])

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1].files


def card_errors(content: str) -> list[str]:
    """What is wrong with the metadata of a model card."""
    match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
    if match is None:
        return ["there are no metadata"]
    try:
        data = yaml.safe_load(match.group(1))
    except yaml.YAMLError as error:
        return [str(error)]
    if not isinstance(data, dict):
        return ["metadata are no mapping"]
    errors = []
    for name in ("license", "library_name", "pipeline_tag"):
        if not isinstance(data.get(name, ""), str):
            errors.append(f"{name} is no string")
    for name in ("tags", "datasets", "base_model"):
        values = data.get(name, [])
        for value in values if isinstance(values, list) else [values]:
            if not isinstance(value, str) or not value:
                errors.append(f"{name} has {value!r}")
            elif name != "tags" and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", value):
                errors.append(f"{name} has {value!r}, which names no repository")
    for entry in data.get("model-index", []):
        if not isinstance(entry.get("name"), str):
            errors.append("model-index has no name")
        for result in entry["results"]:
            for part, names in (("task", ["type"]), ("dataset", ["type", "name"])):
                for name in names:
                    if not isinstance(result.get(part, {}).get(name), str):
                        errors.append(f"model-index has no {part}.{name}")
            for metric in result.get("metrics") or [{}]:
                if not isinstance(metric.get("type"), str) or not isinstance(metric.get("value"), int | float | str):
                    errors.append("model-index has no metric")
    return errors


class Hub(ThreadingHTTPServer):
    """`with Hub() as hub:` answers at `hub.endpoint`."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.unanswered: list[str] = []
        self.lock = threading.Lock()
        self.thread = threading.Thread(target=self.serve_forever, daemon=True)

    def __enter__(self) -> "Hub":
        self.thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self.shutdown()
        self.thread.join()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    ROUTES = (
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate_card"),
        ("POST", r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", "preupload"),
        ("POST", r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", "commit"),
        ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", "large_file_batch"),
        ("PUT", r"/large-files/(\w+)", "take_large_file"),
        ("GET", r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", "tree"),
        ("GET", r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", "info"),
        ("GET|HEAD", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
    )

    def handle_one_request(self) -> None:
        # Clients may close a connection that they have kept open.
        try:
            super().handle_one_request()
        except ConnectionError:
            self.close_connection = True

    def log_message(self, *arguments) -> None:
        pass

    def route(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        for methods, pattern, name in self.ROUTES:
            match = re.fullmatch(pattern, unquote(url.path))
            if match and self.command in methods.split("|"):
                with self.server.lock:
                    getattr(self, name)(*match.groups())
                return
        self.server.unanswered.append(f"{self.command} {self.path}")
        self.answer({"error": "not part of the stand-in"}, 501)

    do_GET = do_HEAD = do_POST = do_PUT = route

    def answer(self, content: dict | list | bytes, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        headers = {"Content-Length": str(len(body))} | {k.replace("_", "-"): v for k, v in headers.items()}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def allowed(self) -> bool:
        """Whether the request may write; says so if not."""
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self.answer({"error": "Invalid credentials"}, 401)
        return False

    def repository(self, name: str, revision: str | None) -> Repository | None:
        """The repository, at its only branch or last commit; says so if there is none."""
        repository = self.server.repositories.get(name)
        if repository is None:
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        elif revision not in (None, "main", repository.commits[-1].sha):
            self.answer({"error": "Invalid rev id"}, 404, X_Error_Code="RevisionNotFound")
        else:
            return repository
        return None

    def create(self) -> None:
        if not self.allowed():
            return
        wanted = json.loads(self.body)
        name = f"{wanted['organization'] or USER}/{wanted['name']}"
        status = 409 if name in self.server.repositories else 200
        self.server.repositories.setdefault(name, Repository(wanted.get("visibility") == "private"))
        self.answer({"url": f"{self.server.endpoint}/{name}", "name": name}, status)

    def validate_card(self) -> None:
        wanted = json.loads(self.body)
        errors = card_errors(wanted["content"]) if wanted["repoType"] == "model" else ["not a model"]
        answer = {"errors": [{"message": error} for error in errors], "warnings": []}
        self.answer(answer, 400 if errors else 200)

    def preupload(self, name: str, revision: str) -> None:
        if self.allowed() and self.repository(name, revision):
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if LARGE_FILES.search(file["path"]) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(self.body)["files"]
            ]
            self.answer({"files": modes})

    def large_file_batch(self, name: str) -> None:
        if self.allowed() and self.repository(name, None):
            objects = []
            for wanted in json.loads(self.body)["objects"]:
                answer = {"oid": wanted["oid"], "size": wanted["size"]}
                if wanted["oid"] not in self.server.large_files:
                    url = f"{self.server.endpoint}/large-files/{wanted['oid']}"
                    answer["actions"] = {"upload": {"href": url}}
                objects.append(answer)
            self.answer({"transfer": "basic", "objects": objects})

    def take_large_file(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            self.answer({"error": "not what was announced"}, 400)
            return
        self.server.large_files[oid] = self.body
        self.answer({})

    def commit(self, name: str, revision: str) -> None:
        if not self.allowed() or not (repository := self.repository(name, revision)):
            return
        lines = [json.loads(line) for line in self.body.splitlines()]
        files = dict(repository.files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile" and value["oid"] in self.server.large_files:
                files[value["path"]] = self.server.large_files[value["oid"]]
            else:
                self.answer({"error": f"cannot commit {line['key']} {value['path']}"}, 400)
                return
        commit = Commit(lines[0]["value"]["summary"], files)
        repository.commits.append(commit)
        self.answer({"commitUrl": f"{self.server.endpoint}/{name}/commit/{commit.sha}", "commitOid": commit.sha})

    def info(self, name: str, revision: str | None) -> None:
        if repository := self.repository(name, revision):
            siblings = [{"rfilename": path} for path in sorted(repository.files)]
            sha = repository.commits[-1].sha
            self.answer({"id": name, "sha": sha, "private": repository.private, "tags": [], "siblings": siblings})

    def tree(self, name: str, revision: str, folder: str | None) -> None:
        if not (repository := self.repository(name, revision)):
            return
        inside = [path for path in sorted(repository.files) if path.startswith(f"{folder}/" if folder else "")]
        if folder and not inside:
            self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
            return
        self.answer(
            [
                {"type": "file", "path": path, "oid": path, "size": len(repository.files[path])}
                for path in inside
                if "recursive" in self.query or "/" not in path.removeprefix(f"{folder}/" if folder else "")
            ]
        )

    def resolve(self, name: str, revision: str, path: str) -> None:
        if not (repository := self.repository(name, revision)):
            return
        sha = repository.commits[-1].sha
        if path not in repository.files:
            self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
            return
        content = repository.files[path]
        self.answer(content, ETag=f'"{hashlib.sha256(content).hexdigest()}"', X_Repo_Commit=sha)
