//go:build linux

package agent

import (
	"bytes"
	"io"
	"math"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/gondola-vmm/gondola/guestagent/procfs"
	"github.com/gondola-vmm/gondola/guestagent/proto"
)

// userHZ is the unit of times in /proc, 100 a second on every Linux.
const userHZ = 100

// info performs OpInfo.
func (a *Agent) info(c *proto.Call, req *proto.InfoRequest) (any, error) {
	info := summary()
	info.Agent = a.cfg.Software
	w := c.Sender(proto.StreamStdout)
	var owners map[uint64]int
	if req.Processes || req.Connections {
		pids, err := pids()
		if err != nil {
			return nil, err
		}
		if req.Processes {
			n := 0
			users := readUserNames()
			for _, pid := range pids {
				p, ok := readProcess(pid)
				if !ok {
					continue // it has ended
				}
				p.User = users[p.UID]
				if n++; n > proto.MaxList {
					info.Truncated = true
					break
				}
				if err := sendItem(w, proto.InfoItem{Process: &p}); err != nil {
					return nil, err
				}
			}
		}
		if req.Connections {
			owners = socketOwners(pids)
		}
	}
	if req.Connections {
		conns := connections()
		for i := range conns {
			if i == proto.MaxList {
				info.Truncated = true
				break
			}
			conns[i].PID = owners[conns[i].Inode]
			if err := sendItem(w, proto.InfoItem{Connection: &conns[i]}); err != nil {
				return nil, err
			}
		}
	}
	return info, nil
}

func sendItem(w io.Writer, item proto.InfoItem) error {
	b, err := proto.Marshal(item)
	if err != nil {
		return err
	}
	_, err = w.Write(b)
	return err
}

func summary() (info proto.Info) {
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		info.Hostname = unix.ByteSliceToString(u.Nodename[:])
		info.Kernel = unix.ByteSliceToString(u.Release[:])
	}
	var s unix.Sysinfo_t
	if unix.Sysinfo(&s) == nil {
		for i := range info.Load {
			info.Load[i] = float64(s.Loads[i]) / 65536
		}
	}
	var ts unix.Timespec
	if unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts) == nil {
		info.UptimeMS = uint64(ts.Nano() / 1e6)
	}
	for line := range lines("/proc/meminfo") {
		name, rest, _ := strings.Cut(line, ":")
		kib, _, _ := strings.Cut(strings.TrimSpace(rest), " ")
		n := number(kib) << 10
		switch name {
		case "MemTotal":
			info.Memory.Total = n
		case "MemFree":
			info.Memory.Free = n
		case "MemAvailable":
			info.Memory.Available = n
		case "Cached":
			info.Memory.Cached = n
		case "SwapTotal":
			info.Memory.SwapTotal = n
		case "SwapFree":
			info.Memory.SwapFree = n
		}
	}
	for line := range lines("/proc/stat") {
		if len(line) > 3 && line[:3] == "cpu" && line[3] != ' ' {
			info.CPUs++
		}
	}
	return info
}

// lines iterates over a file's lines; there are none if it cannot be read.
func lines(file string) func(func(string) bool) {
	return func(yield func(string) bool) {
		b, err := procfs.ReadAll(file)
		if err != nil {
			return
		}
		for line := range strings.SplitSeq(strings.TrimSuffix(string(b), "\n"), "\n") {
			if !yield(line) {
				return
			}
		}
	}
}

// number is 0 for what is no number.
func number(s string) uint64 {
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil {
		return 0
	}
	return n
}

func integer(s string) int {
	n, err := strconv.Atoi(s)
	if err != nil {
		return 0
	}
	return n
}

// pids lists the processes, in the kernel's order.
func pids() ([]int, error) {
	names, err := procfs.ReadDir("/proc", math.MaxInt)
	if err != nil {
		return nil, err
	}
	pids := make([]int, 0, len(names))
	for _, name := range names {
		if pid := integer(name); pid > 0 {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

const maxCommand = 1 << 10

// readProcess reads one process (S4.1); ok is false if it is gone.
func readProcess(pid int) (p proto.Process, ok bool) {
	var buf [maxCommand + 1]byte
	stat, err := procfs.ReadOnce(procDir(pid)+"/stat", buf[:])
	if err != nil || !parseStat(stat, &p) {
		return p, false
	}
	return p, complete(&p, pid, buf[:])
}

func procDir(pid int) string { return "/proc/" + strconv.Itoa(pid) }

// complete reads what is not in a process's stat; buf has room for maxCommand bytes.
func complete(p *proto.Process, pid int, buf []byte) bool {
	dir := procDir(pid)
	var st unix.Stat_t
	if unix.Stat(dir, &st) != nil {
		return false
	}
	p.UID = int(st.Uid)
	if !p.Kernel && p.State != "Z" {
		p.Command = command(dir+"/cmdline", buf[:maxCommand])
	}
	readAffinity(p, pid)
	return true
}

func readAffinity(p *proto.Process, pid int) {
	var mask unix.CPUSet
	if unix.SchedGetaffinity(pid, &mask) == nil {
		p.Affinity = affinity(&mask)
	}
}

// userNames are the names of users by number.
type userNames map[int]string

// readUserNames reads /etc/passwd; of two names of a number the first counts.
func readUserNames() userNames {
	u := userNames{}
	scanColons("/etc/passwd", func(f []string) bool {
		if len(f) >= 3 && f[0] != "" {
			if uid, err := strconv.Atoi(f[2]); err == nil && u[uid] == "" && len(u) < proto.MaxList {
				u[uid] = strings.ToValidUTF8(f[0], "\uFFFD")
			}
		}
		return false
	})
	return u
}

// parseStat reads proc(5) stat. The name may hold anything, blanks and
// parentheses included, and ends at the last parenthesis.
func parseStat(b []byte, p *proto.Process) bool {
	open, end := bytes.IndexByte(b, '('), bytes.LastIndexByte(b, ')')
	if open < 0 || end < open {
		return false
	}
	f := strings.Fields(string(b[end+1:]))
	if len(f) < 39 {
		return false
	}
	p.PID = integer(strings.TrimSpace(string(b[:open])))
	p.Name = strings.ToValidUTF8(string(b[open+1:end]), "\uFFFD")
	p.State = strings.ToValidUTF8(f[0], "?")
	p.PPID = integer(f[1])
	p.Kernel = number(f[6])&0x00200000 != 0 // PF_KTHREAD
	p.UserMS = number(f[11]) * (1000 / userHZ)
	p.SystemMS = number(f[12]) * (1000 / userHZ)
	p.Nice = integer(f[16])
	p.Threads = integer(f[17])
	p.StartMS = number(f[19]) * (1000 / userHZ)
	p.VSize = number(f[20])
	p.RSS = number(f[21]) * uint64(os.Getpagesize())
	p.RTPrio = integer(f[37])
	p.Policy = integer(f[38])
	return p.PID > 0
}

// command is what a file of /proc/PID/cmdline says, as far as it goes into buf.
func command(file string, buf []byte) string {
	b, err := procfs.ReadOnce(file, buf)
	if err != nil {
		return ""
	}
	b = bytes.ReplaceAll(bytes.TrimRight(b, "\x00"), []byte{0}, []byte{' '})
	return strings.ToValidUTF8(string(b), "\uFFFD")
}

// affinity cuts trailing zero bytes.
func affinity(mask *unix.CPUSet) []byte {
	var b []byte
	for n := range 1024 {
		if mask.IsSet(n) {
			for len(b) <= n/8 {
				b = append(b, 0)
			}
			b[n/8] |= 1 << (n % 8)
		}
	}
	return b
}

// socketOwners maps socket inodes to the first process that has them open.
func socketOwners(pids []int) map[uint64]int {
	owners := map[uint64]int{}
	for _, pid := range pids {
		dir := "/proc/" + strconv.Itoa(pid) + "/fd"
		names, err := procfs.ReadDir(dir, 1<<16)
		if err != nil {
			continue // it has ended
		}
		for _, name := range names {
			target, err := os.Readlink(dir + "/" + name)
			if err != nil {
				continue
			}
			if s, ok := strings.CutPrefix(target, "socket:["); ok {
				inode := number(strings.TrimSuffix(s, "]"))
				if _, have := owners[inode]; !have {
					owners[inode] = pid
				}
			}
		}
	}
	return owners
}
