# Run by init, as root, in the machine with cgroup v2: mounts what every system has, then does what the third disk says.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 HOME=/root
mount -t proc -o nosuid,nodev,noexec proc /proc
mount -t sysfs -o nosuid,nodev,noexec sysfs /sys
mount -t securityfs -o nosuid,nodev,noexec securityfs /sys/kernel/security
mount -t cgroup2 -o nosuid,nodev,noexec,nsdelegate cgroup2 /sys/fs/cgroup
mount -t tmpfs -o nosuid,nodev,mode=755 tmpfs /run
mkdir -p /dev/pts /dev/shm
mount -t devpts -o nosuid,noexec,gid=5,mode=620,ptmxmode=666 devpts /dev/pts
mount -t tmpfs -o nosuid,nodev,mode=1777 tmpfs /dev/shm
# Our store of images keeps no set-user-ID bits.
chmod u+s /usr/bin/newuidmap /usr/bin/newgidmap
echo machine > /proc/sys/kernel/hostname
tr -d '\0' < /dev/vdc > /run/words.sh
# What a machine usually has, some of which tests ask for or look at.
modprobe -a dummy fuse loop
exec < /dev/null
. /run/words.sh
