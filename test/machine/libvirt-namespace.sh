# The first process in the namespaces of a private libvirt daemon: arranges what the daemon is to see, and waits for it.
# Arguments: the daemon, its directory, the cache directory, where that is to be seen, the user id to run as.
set -e
daemon=$1 dir=$2 cache=$3 inside=$4 uid=$5

mount -t tmpfs -o mode=755 tmpfs /run
mkdir "$inside"
mount --bind "$cache" "$inside"
chown "$uid:$uid" /run

# libvirt looks its user up, and Debian has none of that number.
if ! getent passwd "$uid" >/dev/null; then
    for file in passwd group; do
        cp "/etc/$file" "$dir/$file"
    done
    echo "vmckpt-qemu:x:$uid:$uid::$dir:/bin/false" >>"$dir/passwd"
    echo "vmckpt-qemu:x:$uid:" >>"$dir/group"
    for file in passwd group; do
        mount --bind "$dir/$file" "/etc/$file"
    done
fi

export HOME="$dir" XDG_RUNTIME_DIR=/run
export XDG_CONFIG_HOME="$dir/config" XDG_CACHE_HOME="$dir/cache" XDG_DATA_HOME="$dir/data"
mkdir -p "$XDG_CONFIG_HOME/libvirt" "$XDG_CACHE_HOME" "$XDG_DATA_HOME"
# QEMU writes to files itself: there is no virtlogd here.
cat >"$XDG_CONFIG_HOME/libvirt/qemu.conf" <<CONF
stdio_handler = "file"
security_driver = "none"
CONF
chown -R "$uid:$uid" "$dir"

groups=$(stat -c %g /dev/kvm 2>/dev/null || echo "$uid")
setpriv --reuid "$uid" --regid "$uid" --groups "$groups" "$daemon" &
# Waiting, the shell also reaps what is left to the first process: QEMU, which the daemon starts as one of its own.
wait $!
