"""A real Slurm cluster on this machine, from Debian's packages, for as long as a test needs it.

    with running_cluster(folder) as cluster:      munged, slurmctld, and a slurmd for each node
        cluster.run("sbatch", script)

Each node has its own host name, processes, /etc/hosts and node-local folder; with `network`, its own address behind a
link that can be cut as well. Nodes share the machine's files. Everything lies in the cluster's folder, on ports that
were free. When the block ends, or the process that started it dies, no process is left: a node's processes live in a
namespace and die with its first one.

There is no accounting unless it is asked for: `sacct` says so, as on many small clusters, and slurmctld remembers jobs
that ended for ten minutes.
"""

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
"""Commands, and the packages that have them."""
OF_ACCOUNTING = {"slurmdbd": "slurmdbd slurm-wlm-mysql-plugin", "mariadbd": "mariadb-server-core"}
SYSTEM_TABLES = [Path(f"/usr/share/mysql/mysql_system_tables{part}.sql") for part in ("", "_data")]
"""MariaDB's own, which its server makes from them."""
CONTROLLER = "ctl"
NETWORK = "10.231.17"
"""Of nodes with a network of their own; nobody else can reach it, so any number of clusters may use it."""
INIT = """
set -e
hostname "$1"
mount --bind "$2/etc/hosts" /etc/hosts
mkdir -p "$2/nodes/$1"
mount --bind "$2/nodes/$1" "$2/local"
"""
"""What is a host's own. $1 is its name, $2 the cluster's folder."""
# bash is the first process of the node: it takes in orphans, and when it dies, the kernel ends all of the node's.
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
    ip address add {NETWORK}.254/24 dev bridge0
    ip link set bridge0 up
fi
touch "$2/run/ready"
exec sleep infinity
"""

Found = TypeVar("Found")


def require_slurm(needed: Mapping[str, str] = NEEDED) -> None:
    """Installs Slurm where that is possible; skips the test where it is not, and says what is missing."""
    packages = " ".join(needed.values())
    with (Path(tempfile.gettempdir()) / "byteloom-tests-apt.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two test processes may want it at once
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
        pytest.skip("no Slurm: only root may make the namespaces of its nodes")


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
    """A cluster while the block lasts. Skips the test where there can be none.

    Args:
        folder: made anew; a short path, for there are sockets in it.
        network: whether each node has its own; then `Cluster.cut` cuts it, and commands must run in `Cluster.inside`.
        grace: seconds between the signal of a preemption and the end.
        accounting: by slurmdbd, with a database of the cluster's own.
    """
    require_slurm(NEEDED | OF_ACCOUNTING if accounting else NEEDED)
    names = [f"n{number}" for number in range(1, nodes + 1)]
    cluster = Cluster(folder, names, network, accounting)
    try:
        cluster._start(grace)
        yield cluster
    finally:
        cluster._stop()


class Cluster:
    """Its nodes have four processors and two made-up GPUs each; jobs of partition `high` preempt those of `low`."""

    def __init__(self, folder: Path, nodes: Sequence[str], network: bool, accounting: bool) -> None:
        self.folder = folder
        self.nodes = nodes
        self.local = folder / "local"
        """A folder that each node has for itself."""
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "etc/slurm.conf")}
        """For commands that speak to the cluster."""
        self.inside: list[str] = []
        """Before a command, runs it where the cluster can be reached; empty where that is everywhere."""
        self._network, self._accounting = network, accounting
        self._controller: list[str] = []
        """Before a command, runs it on the controller's host."""
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def run(self, *command: object, check: bool = True) -> str:
        """What a command that speaks to the cluster says on standard output; with `check`, it must succeed."""
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
        """Fields of a job, as `scontrol show job` names them."""
        words = self.run("scontrol", "-o", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, job: str, *states: str, seconds: float = 60) -> None:
        """Until a job is in one of Slurm's states."""
        wait_until(lambda: self.job(job)["JobState"] in states, f"job {job} is {' or '.join(states)}", seconds)

    def processes(self, job: str, rank: int | None = None) -> list[int]:
        """Processes of a job's ranks, or of one rank, eldest first, by their numbers on this machine.

        Args:
            job: its id, or that of an element of an array: 12_3.
        """
        array, _, element = job.partition("_")
        wanted = (
            {f"SLURM_ARRAY_JOB_ID={array}", f"SLURM_ARRAY_TASK_ID={element}"} if element else {f"SLURM_JOB_ID={job}"}
        )
        if rank is not None:
            wanted.add(f"SLURM_PROCID={rank}")
        # The batch script has a rank too, but no step.
        return [
            pid
            for pid, words in self.all_processes().items()
            if wanted <= words and any(word.startswith("SLURM_STEP_ID=") for word in words)
        ]

    def crash(self, node: str) -> None:
        """As a power cut: all processes of a node are gone."""
        self._end(node)

    def kill_slurmd(self, node: str) -> None:
        """A node is lost to Slurm; its ranks live on."""
        wanted = ["slurmd", "-D", "-f", self.environment["SLURM_CONF"], "-N", node]
        [pid] = [pid for pid, _ in self.all_processes().items() if _read(pid, "cmdline") == wanted]
        os.kill(pid, signal.SIGKILL)

    def start_node(self, node: str) -> None:
        """Starts a node that is down, with none of its earlier processes."""
        if node in self._daemons:
            self._end(node)
        self._spawn(node, "unshare", *self._new("--pid"), "bash", "-c", NODE, "node", node, self.folder, self._kind)
        if not self._network:
            return
        [init] = wait_until(lambda: _children(self._daemons[node].pid), f"{node} has begun", 10)
        number = self.nodes.index(node) + 1
        link = f"v{number}"
        self.run("sh", "-c", f"ip link delete {link} 2>/dev/null || true")  # of a node that has just died
        self.run("ip", "link", "add", "name", link, "type", "veth", "peer", "name", "eth0", "netns", init)
        self.run("ip", "link", "set", link, "master", "bridge0", "up")
        node_network = ["nsenter", "-t", init, "--net", "--"]
        self.run(*node_network, "ip", "address", "add", f"{NETWORK}.{number}/24", "dev", "eth0")
        self.run(*node_network, "ip", "link", "set", "eth0", "up")

    def cut(self, node: str) -> None:
        """Cuts a node's network; its processes live on."""
        self.run("ip", "link", "set", f"v{self.nodes.index(node) + 1}", "down")

    def mend(self, node: str) -> None:
        """Undoes `cut`."""
        self.run("ip", "link", "set", f"v{self.nodes.index(node) + 1}", "up")

    @property
    def _kind(self) -> str:
        return "network" if self._network else "host"

    def _new(self, *more: str) -> list[str]:
        """Arguments of unshare: everything that is a host's own."""
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
        """Starts slurmctld anew, with no memory of any job that has ended."""
        self._end("slurmctld")
        self._start_controller()
        self._wait(lambda: "UP" in self.run("scontrol", "ping", check=False), "slurmctld")

    def _start_controller(self) -> None:
        self._spawn("slurmctld", *self._controller, "slurmctld", "-D", "-i", "-c", "-f", self.environment["SLURM_CONF"])

    def _start_accounting(self) -> None:
        """A database that only its socket leads to, and slurmdbd before it."""
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
        controller = f"{NETWORK}.254" if self._network else "127.0.0.1"
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
        for number in range(2):  # stand for GPUs: Slurm then sets CUDA_VISIBLE_DEVICES
            os.mknod(etc / f"gpu{number}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        (etc / "gres.conf").write_text(f"NodeName={','.join(self.nodes)} Name=gpu File={etc}/gpu[0-1]\n")
        (etc / "munge.key").write_bytes(os.urandom(1024))
        (etc / "munge.key").chmod(0o600)

    def _spawn(self, name: str, *command: object) -> None:
        """Starts a process that dies with this one; it is known by the name."""
        with (self.folder / "log" / f"{name}.out").open("ab") as out:
            self._daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *map(str, command)],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _end(self, name: str) -> None:
        """Kills a process by its name; of a node, all that it has: they are gone on return."""
        process = self._daemons.pop(name)
        for pid in _children(process.pid) if name in self.nodes else []:
            os.kill(pid, signal.SIGKILL)  # the parent ends after it, and after those which live in its namespace
        if name not in self.nodes:
            process.kill()
        process.wait(30)

    def _wait(self, condition: Callable[[], object], what: str) -> None:
        def check() -> object:
            for name, process in self._daemons.items():
                if process.poll() is not None:
                    raise AssertionError(f"{name} died:\n{(self.folder / 'log' / f'{name}.out').read_text()[-2000:]}")
            return condition()

        wait_until(check, what, 90)

    def _stop(self) -> None:
        for name in reversed(list(self._daemons)):
            self._end(name)

    def all_processes(self) -> dict[int, set[str]]:
        """Processes of this cluster by their numbers on this machine, eldest first, and their environments."""
        mine = f"SLURM_CONF={self.environment['SLURM_CONF']}"
        found = {int(path.name): set(_read(int(path.name), "environ")) for path in Path("/proc").glob("[0-9]*")}
        return {pid: words for pid, words in sorted(found.items()) if mine in words and pid != os.getpid()}


def wait_until(condition: Callable[[], Found], what: str, seconds: float) -> Found:
    """What the condition returns when that is true for the first time."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s in vain: {what}"
        time.sleep(0.05)
    return found


def _children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _read(pid: int, name: str) -> list[str]:
    """The words of a file of /proc; none if the process is gone."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
    except OSError:
        return []


def _free_ports(count: int) -> list[int]:
    """Below those that the system gives to clients, so that none is taken before it is used."""
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
