#!/usr/bin/env bash
# Makes PostgreSQL, Redis, RabbitMQ and Mosquitto answer on their standard local ports.
# What answers already is left alone; what is missing is installed (Debian, as root), started and waited for.
set -euo pipefail

answers() { # port
    (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null
}

answers_fully() { # name: the server itself says that it is up, not only its port
    case $1 in
        PostgreSQL) as postgres psql --quiet --no-psqlrc --dbname postgres --command 'SELECT 1' ;;
        Redis) redis-cli -h 127.0.0.1 ping ;;
        RabbitMQ) rabbitmqctl --quiet await_startup --timeout 60 ;;
        Mosquitto) answers 1883 ;;
    esac >/dev/null 2>&1
}

as() { # user command...
    local user=$1
    shift
    setpriv --reuid="$user" --regid="$user" --init-groups --reset-env "$@"
}

is_updated=
apt_install() { # package...
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        echo "Missing and not installable here (this needs root and apt-get): $*" >&2
        return 1
    fi
    local log
    log=$(mktemp)
    [ -n "$is_updated" ] || apt-get update >"$log" 2>&1 || true # a stale list may do
    is_updated=yes
    if ! DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends "$@" >>"$log" 2>&1; then
        cat "$log" >&2
        return 1
    fi
    rm -f "$log"
}

start() { # name
    case $1 in
        PostgreSQL)
            local version
            version=$(pg_lsclusters --no-header | awk '$2 == "main" { print $1 }' | tail -n 1)
            [ -n "$version" ] || { version=$(ls /usr/lib/postgresql | sort -V | tail -n 1); pg_createcluster "$version" main >/dev/null; }
            pg_ctlcluster --skip-systemctl-redirect "$version" main start
            ;;
        Redis) redis-server --daemonize yes --bind 127.0.0.1 --port 6379 --save "" --appendonly no --dir /tmp >/dev/null ;;
        RabbitMQ) rabbitmq-server -detached ;;
        # Debian's own configuration needs folders that only its init script makes. Without one, it listens locally.
        Mosquitto) mosquitto -d -p 1883 ;;
    esac
}

provide() { # name port program package
    local name=$1 port=$2 program=$3 package=$4
    if answers "$port"; then
        echo "$name answers on port $port"
        # Tests that stop or freeze a server start their own from the program.
        command -v "$program" >/dev/null || apt_install "$package" || echo "$name: no program to start others with"
        return
    fi
    command -v "$program" >/dev/null || apt_install "$package"
    # A package may have started its server already; what matters is whether it answers below.
    answers "$port" || start "$name" || true
    local tries=0
    until answers "$port" && answers_fully "$name"; do
        tries=$((tries + 1))
        [ "$tries" -lt 90 ] || { echo "$name does not answer on port $port after 90 s" >&2; return 1; }
        sleep 1
    done
    echo "$name was started on port $port"
}

let_root_create_databases() {
    [ "$(id -u)" = 0 ] && id postgres >/dev/null 2>&1 || return 0
    as postgres psql --quiet --no-psqlrc --dbname postgres --command "DO \$\$ BEGIN
        IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'root') THEN CREATE ROLE root LOGIN SUPERUSER; END IF;
    END \$\$" || echo "PostgreSQL: no role for root; the tests start a server of their own if they can't log in"
}

PATH=$PATH:/usr/sbin:/sbin
provide PostgreSQL 5432 pg_ctlcluster postgresql
provide Redis 6379 redis-server redis-server
provide RabbitMQ 5672 rabbitmq-server rabbitmq-server
provide Mosquitto 1883 mosquitto mosquitto
let_root_create_databases
