"""Accounting for the test cluster: mariadb and slurmdbd on loopback, so that sacct answers."""

from __future__ import annotations

import secrets
import shutil
from typing import TYPE_CHECKING

import configuration
from processes import ClusterError, until

if TYPE_CHECKING:
    from cluster import Cluster

PACKAGES = {
    "slurmdbd": "slurmdbd",
    "sacctmgr": "slurmdbd",
    "mariadbd": "mariadb-server",
    "mariadb-install-db": "mariadb-server",
}


def start(cluster: Cluster, ports: configuration.Ports) -> None:
    """Bring up the database and slurmdbd and register the cluster; munged runs already."""
    folder, daemons = cluster.folder, cluster.daemons
    data, socket = folder / "database", folder / "database.socket"
    made = cluster.call(
        "mariadb-install-db", "--no-defaults", "--user=root", f"--datadir={data}", "--skip-test-db", timeout_s=60
    )
    if made.returncode != 0:
        raise ClusterError(f"mariadb-install-db: {(made.stderr or made.stdout).strip()[-300:]}")
    files = [f"--datadir={data}", f"--socket={socket}", f"--pid-file={folder}/run/mariadbd.pid"]
    network = ["--bind-address=127.0.0.1", f"--port={ports.database}"]
    small = ["--innodb-buffer-pool-size=32M", "--innodb-log-file-size=16M", "--performance-schema=OFF"]
    server = shutil.which("mariadbd") or "mariadbd"
    daemons.start("mariadbd", [server, "--no-defaults", "--user=root", *files, *network, *small])

    password = secrets.token_hex(16)
    script = folder / "grant.sql"
    script.touch(mode=0o600)
    # the database first: newer clients lose their options when they connect to one that is not there, and slurmdbd gives up
    script.write_text(
        f"CREATE DATABASE slurm_acct_db;\n"
        f"CREATE USER 'slurm'@'127.0.0.1' IDENTIFIED BY '{password}';\n"
        f"CREATE USER 'slurm'@'localhost' IDENTIFIED BY '{password}';\n"
        "GRANT ALL ON slurm_acct_db.* TO 'slurm'@'127.0.0.1', 'slurm'@'localhost';\n"
    )
    client = ["mariadb", "--no-defaults", f"--socket={socket}"]
    if not until(lambda: cluster.call(*client, "-e", "SELECT 1").returncode == 0, 30):
        raise ClusterError(f"mariadbd did not start: {daemons.last_words('mariadbd')}")
    granted = cluster.call(*client, "-e", f"source {script}")
    if granted.returncode != 0:
        raise ClusterError(f"mariadb: {granted.stderr.strip()}")
    script.unlink()

    conf = folder / "slurmdbd.conf"
    conf.touch(mode=0o600)
    conf.write_text(configuration.slurmdbd_conf(folder, ports, password))
    daemons.start("slurmdbd", ["slurmdbd", "-D"], environment=cluster.environment())
    if not until(lambda: cluster.call("sacctmgr", "-n", "show", "cluster").returncode == 0, 30):
        raise ClusterError(f"slurmdbd did not start: {daemons.last_words('slurmdbd')}")
    for what in (["cluster", "testbed"], ["account", "testbed", "cluster=testbed"], ["user", "root", "account=testbed"]):
        cluster.call("sacctmgr", "-i", "add", *what)
