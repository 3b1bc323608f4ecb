"""A real Slurm cluster on this machine, from Debian's packages, for the duration of a test.

    with running_cluster(folder) as cluster:      munged, slurmctld, and a slurmd for each node
        cluster.run("sbatch", script)

Each node has its own host name, processes, /etc/hosts and node-local folder. With `network` it also has its own
address, behind a link that can be cut. Nodes share the machine's files. All files of the cluster are in its folder, and
its ports were free. No process remains when the block ends, or when the process that started the cluster dies: the
processes of a node are in one namespace and die with its first process.

There is no accounting by default: `sacct` reports that, as on many small clusters, and slurmctld remembers ended jobs
for ten minutes.
"""

import ctypes
import fcntl
import os
import shutil
import signal
import socket
import stat
import string
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pytest

NEEDED = {
    "munged": "munge",
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "ip": "iproute2",
    "nsenter": "util-linux",
}
"""Debian packages by the command that they provide."""
NEEDED_FOR_ACCOUNTING = {"slurmdbd": "slurmdbd slurm-wlm-mysql-plugin", "mariadbd": "mariadb-server-core"}
SYSTEM_TABLES = [Path(f"/usr/share/mysql/mysql_system_tables{part}.sql") for part in ("", "_data")]
"""Files from which a MariaDB server makes its system tables."""
CONTROLLER = "ctl"
NETWORK = "10.231.17"
"""Network of nodes with `network`. It is isolated, so any number of clusters may use the same one."""
CONTROLLER_ADDRESS = f"{NETWORK}.254"
"""Address of the controller in that network."""
CLONE_NEWNET = 0x40000000
"""Kind of namespace for setns(2)."""
INIT = """
set -e
hostname "$1"
mount --bind "$2/etc/hosts" /etc/hosts
mkdir -p "$2/nodes/$1"
mount --bind "$2/nodes/$1" "$2/local"
"""
"""Script that sets up a host. $1 is its name, $2 the cluster's folder."""
# bash is the first process of the node. It adopts orphans, and when it dies, the kernel kills the node's processes.
NODE = f"""{INIT}
if [ "$3" = network ]; then ip link set lo up; until ip -o link show up | grep -q eth0; do sleep 0.05; done; fi
set +e
slurmd -D -f "$SLURM_CONF" -N "$1" &
while :; do sleep 86400 & wait $!; done
"""
HOLDER = f"""{INIT}
if [ "$3" = network ]; then
    ip link set lo up
    ip link add name bridge0 type bridge
    ip address add {CONTROLLER_ADDRESS}/24 dev bridge0
    ip link set bridge0 up
fi
touch "$2/run/ready"
exec sleep infinity
"""

Found = TypeVar("Found")


def require_slurm(needed: Mapping[str, str] = NEEDED) -> None:
    """Install Slurm if possible; otherwise skip the test and name what is missing."""
    packages = " ".join(needed.values())
    with (Path(tempfile.gettempdir()) / "byteloom-tests-apt.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several test processes may try at once
        if _missing(needed) and os.geteuid() == 0 and shutil.which("apt-get"):
            for command in (["update"], ["install", "-y", "--no-install-recommends", *packages.split()]):
                subprocess.run(
                    ["apt-get", "-o", "DPkg::Lock::Timeout=120", *command],
                    env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    check=False,
                )
    if missing := _missing(needed):
        pytest.skip(f"no Slurm: {', '.join(missing)} missing (apt-get install {packages})")
    own = ["unshare", "--uts", "--mount", "--pid", "--fork", "true"]
    if os.geteuid() != 0 or subprocess.run(own, check=False).returncode:
        pytest.skip("no Slurm: only root may create the namespaces of its nodes")


def _missing(needed: Mapping[str, str]) -> list[str]:
    return [name for name in needed if shutil.which(name) is None]


@contextmanager
def running_cluster(
    folder: Path,
    *,
    nodes: int = 4,
    network: bool = False,
    grace: int = 20,
    accounting: bool = False,
) -> Iterator["Cluster"]:
    """Run a cluster during a `with` block, or skip the test if no cluster can run here.

    Args:
        folder: folder that is deleted and created. Its path must be short, because it holds sockets.
        nodes: number of nodes.
        network: whether each node has its own network, which `Cluster.cut` cuts; commands then run in `Cluster.inside`.
        grace: seconds between the signal of a preemption and the end of the job.
        accounting: whether slurmdbd keeps accounting, in a database of this cluster.
    """
    require_slurm(NEEDED | NEEDED_FOR_ACCOUNTING if accounting else NEEDED)
    names = [f"n{number}" for number in range(1, nodes + 1)]
    cluster = Cluster(folder, names, network, accounting)
    try:
        cluster._start(grace)
        yield cluster
    finally:
        cluster._stop()


class Cluster:
    """Slurm cluster whose nodes have four processors and two fake GPUs; partition `high` preempts `low`."""

    def __init__(self, folder: Path, nodes: Sequence[str], network: bool, accounting: bool) -> None:
        self.folder = folder
        self.nodes = nodes
        self.local = folder / "local"
        """Path of a folder with separate content on each node."""
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "etc/slurm.conf")}
        """Environment of commands that contact the cluster."""
        self.inside: list[str] = []
        """Prefix of a command that must reach the cluster; empty if every process can."""
        self._network, self._accounting = network, accounting
        self._controller: list[str] = []
        """Prefix of a command that must run on the controller's host."""
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def run(self, *command: object, check: bool = True) -> str:
        """Run a command that contacts the cluster and return its output; with `check`, it must succeed."""
        done = subprocess.run(
            [*self.inside, *map(str, command)],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if check and done.returncode:
            raise AssertionError(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stderr}")
        return done.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """Return the fields of a job, with the names of `scontrol show job`."""
        words = self.run("scontrol", "-o", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, job: str, *states: str, seconds: float = 240) -> None:
        """Wait until a job is in one of Slurm's states."""
        wait_until(lambda: self.job(job)["JobState"] in states, f"job {job} is {' or '.join(states)}", seconds)

    def processes(self, job: str, rank: int | None = None) -> list[int]:
        """Return the ids on this machine of the processes of a job's ranks, or of one rank, oldest first.

        Args:
            job: id of a job, or of an array element: 12_3.
            rank: rank whose processes are returned, or None for all ranks.
        """
        array, _, element = job.partition("_")
        wanted = (
            {f"SLURM_ARRAY_JOB_ID={array}", f"SLURM_ARRAY_TASK_ID={element}"} if element else {f"SLURM_JOB_ID={job}"}
        )
        if rank is not None:
            wanted.add(f"SLURM_PROCID={rank}")
        # The batch script also has a rank, but no step.
        return [
            pid
            for pid, words in self.all_processes().items()
            if wanted <= words and any(word.startswith("SLURM_STEP_ID=") for word in words)
        ]

    def crash(self, node: str) -> None:
        """Kill all processes of a node, as a power cut does."""
        self._end(node)

    def kill_slurmd(self, node: str) -> None:
        """Kill only the slurmd of a node, so that Slurm loses the node but its ranks continue."""
        wanted = ["slurmd", "-D", "-f", self.environment["SLURM_CONF"], "-N", node]
        [pid] = [pid for pid, _ in self.all_processes().items() if _read(pid, "cmdline") == wanted]
        os.kill(pid, signal.SIGKILL)

    def start_node(self, node: str) -> None:
        """Start a node that is down, without its earlier processes."""
        if node in self._daemons:
            self._end(node)
        self._spawn(node, "unshare", *self._new("--pid"), "bash", "-c", NODE, "node", node, self.folder, self._kind)
        if not self._network:
            return
        [init] = wait_until(lambda: children_of(self._daemons[node].pid), f"{node} has started", 10)
        number = self.nodes.index(node) + 1
        link = f"v{number}"
        self.run("sh", "-c", f"ip link delete {link} 2>/dev/null || true")  # left by a node that has just died
        self.run("ip", "link", "add", "name", link, "type", "veth", "peer", "name", "eth0", "netns", init)
        self.run("ip", "link", "set", link, "master", "bridge0", "up")
        node_network = ["nsenter", "-t", init, "--net", "--"]
        self.run(*node_network, "ip", "address", "add", f"{NETWORK}.{number}/24", "dev", "eth0")
        self.run(*node_network, "ip", "link", "set", "eth0", "up")

    def join_network(self) -> None:
        """Move this thread, and what it starts from now on, into the network of the cluster, to the controller."""
        with Path(f"/proc/{self._daemons[CONTROLLER].pid}/ns/net").open("rb") as namespace:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.setns(namespace.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "this thread cannot join the network")
        self.inside = []

    def cut(self, node: str) -> None:
        """Cut a node's network; its processes continue."""
        self.run("ip", "link", "set", f"v{self.nodes.index(node) + 1}", "down")

    def mend(self, node: str) -> None:
        """Restore the network that `cut` cut."""
        self.run("ip", "link", "set", f"v{self.nodes.index(node) + 1}", "up")

    @property
    def _kind(self) -> str:
        return "network" if self._network else "host"

    def _new(self, *more: str) -> list[str]:
        """Return arguments of unshare for the namespaces of a host."""
        own = [*more, "--uts", "--mount", *(["--net"] if self._network else [])]
        return [*own, *(["--fork", "--kill-child", "--mount-proc"] if "--pid" in more else [])]

    def _start(self, grace: int) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        for name in ("etc", "run", "log", "spool/controller", "local", *(f"spool/{node}" for node in self.nodes)):
            (self.folder / name).mkdir(parents=True)
        self.folder.chmod(0o755)
        self._configure(grace)
        self._spawn(
            CONTROLLER, "unshare", *self._new(), "bash", "-c", HOLDER, "holder", CONTROLLER, self.folder, self._kind
        )
        self._wait((self.folder / "run/ready").exists, "the controller's host")
        net = ["--net"] if self._network else []
        self._controller = ["nsenter", "-t", str(self._daemons[CONTROLLER].pid), "--uts", "--mount", *net, "--"]
        if self._network:
            self.inside = self._controller
        self._spawn(
            "munged",
            *("munged", "--foreground", "--force", f"--key-file={self.folder}/etc/munge.key"),
            *(f"--socket={self.folder}/run/munge.sock", f"--pid-file={self.folder}/run/munged.pid"),
            *(f"--log-file={self.folder}/log/munged.log", f"--seed-file={self.folder}/run/munged.seed"),
        )
        self._wait((self.folder / "run/munge.sock").exists, "munged")
        if self._accounting:
            self._start_accounting()
        self._start_controller()
        for node in self.nodes:
            self.start_node(node)
        everyone = str(len(self.nodes))
        self._wait(
            lambda: self.run("sinfo", "-h", "-p", "low", "-t", "idle", "-o", "%D", check=False) == everyone, "all nodes"
        )

    def restart_controller(self) -> None:
        """Restart slurmctld without its memory of ended jobs."""
        self._end("slurmctld")
        self._start_controller()
        self._wait(lambda: "UP" in self.run("scontrol", "ping", check=False), "slurmctld")

    def stop_controller(self) -> None:
        """Let slurmctld save what it knows, and end it."""
        self._daemons["slurmctld"].terminate()
        self._daemons["slurmctld"].wait(30)
        self._end("slurmctld")

    def continue_controller(self) -> None:
        """Start slurmctld with what it saved."""
        self._start_controller("-D", "-i")
        self._wait(lambda: "UP" in self.run("scontrol", "ping", check=False), "slurmctld")

    def _start_controller(self, *options: str) -> None:
        options = options or ("-D", "-i", "-c")
        self._spawn("slurmctld", *self._controller, "slurmctld", *options, "-f", self.environment["SLURM_CONF"])

    def _start_accounting(self) -> None:
        """Start a database that listens only on a socket, and slurmdbd."""
        (self.folder / "mysql").mkdir()
        server = [
            *("mariadbd", "--no-defaults", "--user=root", f"--datadir={self.folder}/mysql", "--skip-networking"),
            *(f"--socket={self.folder}/run/mysql.sock", f"--pid-file={self.folder}/run/mysql.pid"),
            *("--skip-grant-tables", "--skip-log-bin", "--innodb-log-file-size=8M", "--innodb-buffer-pool-size=32M"),
            *("--innodb-lock-wait-timeout=900", "--performance-schema=OFF", "--skip-name-resolve"),
        ]
        tables = "create database if not exists mysql;\nuse mysql;\n" + "".join(p.read_text() for p in SYSTEM_TABLES)
        subprocess.run([*server, "--bootstrap"], input=tables, text=True, capture_output=True, check=True)
        self._spawn("mariadbd", *server)
        self._wait((self.folder / "run/mysql.sock").exists, "mariadbd")
        self._spawn(
            "slurmdbd", "env", f"MYSQL_UNIX_PORT={self.folder}/run/mysql.sock", *self._controller, "slurmdbd", "-D"
        )
        self._wait(lambda: "Cluster" in self.run("sacctmgr", "show", "cluster", check=False), "slurmdbd")
        self.run("sacctmgr", "--immediate", "--quiet", "add", "cluster", "byteloom")

    def _configure(self, grace: int) -> None:
        own = [f"{NETWORK}.{number}" if self._network else "127.0.0.1" for number in range(1, len(self.nodes) + 1)]
        controller = CONTROLLER_ADDRESS if self._network else "127.0.0.1"
        ports = _free_ports(len(self.nodes) + 2)
        hosts = [("127.0.0.1", "localhost"), (controller, CONTROLLER), *zip(own, self.nodes, strict=True)]
        lines = [
            f"NodeName={name} NodeAddr={address} Port={port} CPUs=4 Boards=1 Sockets=1 "
            f"CoresPerSocket=4 ThreadsPerCore=1 RealMemory=4000 Gres=gpu:2 State=UNKNOWN"
            for name, address, port in zip(self.nodes, own, ports[2:], strict=True)
        ]
        accounting = ["AccountingStorageType=accounting_storage/none"]
        if self._accounting:
            accounting = [
                "AccountingStorageType=accounting_storage/slurmdbd",
                f"AccountingStorageHost={controller}",
                f"AccountingStoragePort={ports[1]}",
                f"AccountingStoragePass={self.folder}/run/munge.sock",  # AuthInfo is not used for this connection
            ]
        etc = self.folder / "etc"
        filled = string.Template((Path(__file__).with_name("slurm.conf.in")).read_text()).substitute(
            grace=grace,
            folder=self.folder,
            user="root",
            controller=CONTROLLER,
            controller_address=controller,
            controller_port=ports[0],
            accounting="\n".join(accounting),
            first_job=int(time.time() * 100) % 50_000_000 + 1,
            nodes="\n".join(lines),
            node_names=",".join(self.nodes),
        )
        (etc / "slurm.conf").write_text(filled)
        (etc / "slurmdbd.conf").write_text(
            f"AuthType=auth/munge\nAuthInfo=socket={self.folder}/run/munge.sock\nDbdHost={CONTROLLER}\n"
            f"DbdAddr={controller}\nDbdPort={ports[1]}\nSlurmUser=root\nStorageType=accounting_storage/mysql\n"
            f"StorageHost=localhost\nStorageUser=root\nStorageLoc=slurm\nLogFile={self.folder}/log/slurmdbd.log\n"
            f"PidFile={self.folder}/run/slurmdbd.pid\nCommunicationParameters=NoInAddrAny\n"
        )
        (etc / "slurmdbd.conf").chmod(0o600)
        (etc / "hosts").write_text("".join(f"{address} {name}\n" for address, name in hosts))
        (etc / "cgroup.conf").write_text("CgroupAutomount=no\nConstrainCores=no\nConstrainRAMSpace=no\n")
        for number in range(2):  # fake GPUs, for which Slurm sets CUDA_VISIBLE_DEVICES
            os.mknod(etc / f"gpu{number}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        (etc / "gres.conf").write_text(f"NodeName={','.join(self.nodes)} Name=gpu File={etc}/gpu[0-1]\n")
        (etc / "munge.key").write_bytes(os.urandom(1024))
        (etc / "munge.key").chmod(0o600)

    def _spawn(self, name: str, *command: object) -> None:
        """Start a named process that dies with this one. A core file of it stays in the cluster's folder."""
        with (self.folder / "log" / f"{name}.out").open("ab") as out:
            self._daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *map(str, command)],
                env=self.environment,
                cwd=self.folder / "log",
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _end(self, name: str) -> None:
        """Kill a named process, or all processes of a node, and wait until they are gone."""
        process = self._daemons.pop(name)
        for pid in children_of(process.pid) if name in self.nodes else []:
            os.kill(pid, signal.SIGKILL)  # the parent ends after it and after the other processes of its namespace
        if name not in self.nodes:
            process.kill()
        process.wait(30)

    def _wait(self, condition: Callable[[], object], description: str) -> None:
        def check() -> object:
            for name, process in self._daemons.items():
                if process.poll() is not None:
                    raise AssertionError(f"{name} died:\n{(self.folder / 'log' / f'{name}.out').read_text()[-2000:]}")
            return condition()

        wait_until(check, description, 90)

    def _stop(self) -> None:
        for name in reversed(list(self._daemons)):
            self._end(name)

    def all_processes(self) -> dict[int, set[str]]:
        """Return the environments of this cluster's processes by process id on this machine, oldest first."""
        marker = f"SLURM_CONF={self.environment['SLURM_CONF']}"
        found = {int(path.name): set(_read(int(path.name), "environ")) for path in Path("/proc").glob("[0-9]*")}
        return {pid: words for pid, words in sorted(found.items()) if marker in words and pid != os.getpid()}


def wait_until(condition: Callable[[], Found], description: str, seconds: float) -> Found:
    """Wait until a condition returns something true, and return it."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not true after {seconds:.0f} s: {description}"
        time.sleep(0.05)
    return found


def children_of(pid: int) -> list[int]:
    """Return the process ids of the children of a process; nothing if it is gone."""
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _read(pid: int, name: str) -> list[str]:
    """Return the words of a file of /proc, or nothing if the process is gone."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
    except OSError:
        return []


def _free_ports(count: int) -> list[int]:
    """Return free ports below the range of the system's ephemeral ports, so that none is taken before its use."""
    for first in range(12_000 + os.getpid() * 37 % 18_000, 32_000, 16):
        sockets = [socket.socket() for _ in range(count)]
        try:
            for number, each in enumerate(sockets):
                each.bind(("127.0.0.1", first + number))
        except OSError:
            continue
        finally:
            for each in sockets:
                each.close()
        return list(range(first, first + count))
    raise AssertionError("no free ports")
