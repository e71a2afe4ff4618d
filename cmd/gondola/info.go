package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/gondola-vmm/gondola/firmware/guestkernel"
	"github.com/gondola-vmm/gondola/guestagent"
	"github.com/gondola-vmm/gondola/guestagent/proto"
	"github.com/gondola-vmm/gondola/vmm"
	"github.com/gondola-vmm/gondola/vmm/control"
)

func infoCommand() *cobra.Command {
	var asJSON, all, registers bool
	c := &cobra.Command{
		Use:   "info NAME",
		Short: "Describe a running machine and what runs in it",
		Long: `Describe a running machine: what its monitor knows, and what the agent in its guest
sees: memory, load, processes and network connections. While the agent does not
answer, only the former.

With --registers, what each vCPU is doing, by KVM: registers, the function of
gondola's guest kernel that it is in, interrupts that wait or are served, the
timer. That is for a guest which stands still: the machine is paused for a moment,
and the guest is not asked.`,
		Args:              oneMachine,
		ValidArgsFunction: completeMachine,
		RunE: func(cmd *cobra.Command, args []string) error {
			if registers && all {
				return usageError{errors.New("--registers asks KVM, and --all is of what the guest tells: one of both")}
			}
			if registers {
				return showRegisters(cmd.Context(), args[0], asJSON, cmd.OutOrStdout())
			}
			return info(cmd.Context(), args[0], asJSON, all, cmd.OutOrStdout())
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "machine-readable, with everything")
	c.Flags().BoolVarP(&all, "all", "a", false, "show the guest kernel's own threads and sockets of no process, too")
	c.Flags().BoolVar(&registers, "registers", false, "show what the vCPUs are doing, of a guest that stands still, say")
	return c
}

func showRegisters(ctx context.Context, name string, asJSON bool, w io.Writer) error {
	c, err := dial(ctx, name)
	if err != nil {
		return err
	}
	defer c.Close()
	ps, err := c.Processors(ctx)
	if err != nil {
		return err
	}
	m, err := c.Counters(ctx)
	if err != nil {
		return err
	}
	if m.Kernel == "" { // others may have moved themselves (KASLR)
		nameSymbols(ps)
	}
	if asJSON {
		return printJSON(w, ps)
	}
	for _, p := range ps {
		if _, err := fmt.Fprintln(w, p); err != nil {
			return err
		}
	}
	return nil
}

// nameSymbols says which function of gondola's own kernel each vCPU is in that is in the
// kernel.
func nameSymbols(ps []vmm.Processor) {
	kernel, ok := guestkernel.Place(guestkernel.Options{})
	if !ok {
		return // the addresses are there
	}
	symbols, err := guestkernel.ReadSymbols(filepath.Join(filepath.Dir(kernel), "System.map"))
	if err != nil {
		return
	}
	for i := range ps {
		p := &ps[i]
		if s, ok := symbols.Find(p.RIP); ok && p.CPL == 0 {
			p.Symbol = fmt.Sprintf("%s+%#x", s.Name, p.RIP-s.Addr)
		}
	}
}

// infoTimeout is how long the guest may take to tell what it sees: reading
// /proc is slow where a system call costs 0.3 ms.
const infoTimeout = 30 * time.Second

// The agent's answers in JSON. The fields are those of package proto; a
// conversion holds them together.
type (
	guestView struct {
		Hostname    string           `json:"hostname"`
		Kernel      string           `json:"kernel"`
		Agent       string           `json:"agent"`
		UptimeMS    uint64           `json:"uptime_ms"`
		Load        [3]float64       `json:"load"`
		Memory      memoryView       `json:"memory"`
		CPUs        int              `json:"cpus"`
		Truncated   bool             `json:"truncated,omitempty"`
		Processes   []processView    `json:"processes"`
		Connections []connectionView `json:"connections"`
	}
	memoryView struct {
		Total     uint64 `json:"total_bytes"`
		Free      uint64 `json:"free_bytes"`
		Available uint64 `json:"available_bytes"`
		Cached    uint64 `json:"cached_bytes"`
		SwapTotal uint64 `json:"swap_total_bytes"`
		SwapFree  uint64 `json:"swap_free_bytes"`
	}
	processView struct {
		PID      int    `json:"pid"`
		PPID     int    `json:"ppid"`
		Name     string `json:"name"`
		Command  string `json:"command,omitempty"`
		UID      int    `json:"uid"`
		State    string `json:"state"`
		UserMS   uint64 `json:"user_ms"`
		SystemMS uint64 `json:"system_ms"`
		RSS      uint64 `json:"rss_bytes"`
		VSize    uint64 `json:"vsize_bytes"`
		Threads  int    `json:"threads"`
		Nice     int    `json:"nice"`
		Policy   int    `json:"policy"`
		RTPrio   int    `json:"rt_priority,omitempty"`
		StartMS  uint64 `json:"start_ms"`
		Affinity []byte `json:"affinity,omitempty"`
		Kernel   bool   `json:"kernel,omitempty"`
		User     string `json:"user,omitempty"`
	}
	connectionView struct {
		Protocol string `json:"protocol"`
		Local    string `json:"local"`
		Remote   string `json:"remote,omitempty"`
		State    string `json:"state,omitempty"`
		Inode    uint64 `json:"inode"`
		PID      int    `json:"pid,omitempty"`
		UID      int    `json:"uid"`
		RxBytes  uint64 `json:"rx_bytes,omitempty"`
		TxBytes  uint64 `json:"tx_bytes,omitempty"`
		RxSegs   uint64 `json:"rx_segments,omitempty"`
		TxSegs   uint64 `json:"tx_segments,omitempty"`
		Peer     uint64 `json:"peer_inode,omitempty"`
		Past     int    `json:"past,omitempty"`
	}
)

func viewGuest(g *guestagent.GuestInfo) *guestView {
	v := &guestView{
		Hostname: g.Hostname, Kernel: g.Kernel, Agent: g.Agent, UptimeMS: g.UptimeMS, Load: g.Load,
		Memory: memoryView(g.Memory), CPUs: g.CPUs, Truncated: g.Truncated,
		Processes: []processView{}, Connections: []connectionView{},
	}
	for _, p := range g.Processes {
		v.Processes = append(v.Processes, processView(p))
	}
	for _, c := range g.Connections {
		v.Connections = append(v.Connections, connectionView(c))
	}
	return v
}

func info(ctx context.Context, name string, asJSON, all bool, w io.Writer) error {
	c, err := dial(ctx, name)
	if err != nil {
		return err
	}
	defer c.Close()
	m, err := c.Machine(ctx)
	if err != nil {
		return err
	}
	var g *guestView
	if m.State == control.StateRunning {
		ctx, cancel := context.WithTimeout(ctx, infoTimeout)
		defer cancel()
		seen, err := c.Info(ctx, proto.InfoRequest{Processes: true, Connections: true})
		switch {
		case err == nil:
			g = viewGuest(seen)
		case errors.Is(ctx.Err(), context.DeadlineExceeded): // or the server says that the call was cancelled
			fmt.Fprintf(os.Stderr, "gondola: the guest's agent does not tell within %v what it sees: it is busy, or has too much to tell\n", infoTimeout)
		default:
			return err
		}
	}
	if asJSON {
		return printJSON(w, struct {
			Machine machineView `json:"machine"`
			Guest   *guestView  `json:"guest"`
		}{view(m), g})
	}
	return printInfo(w, m, g, all)
}

func printInfo(w io.Writer, m control.Info, g *guestView, all bool) error {
	tw := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	row := func(title, format string, a ...any) { fmt.Fprintf(tw, title+"\t"+format+"\n", a...) }
	mem := memorySize(m.Memory)
	row("machine", "%s, %s, process %d, for %s", m.Name, m.State, m.PID, shortDuration(time.Since(time.Unix(0, m.Started))))
	row("host", "%s", orDash(m.Host))
	row("size", "%d vCPUs, %s", m.VCPUs, mem.String())
	if u := m.Use; u != nil {
		if u.Balloon {
			row("memory", "target %s, actual %s, %s of the host's, PSS %s", size(u.Target), size(u.Actual), size(u.Allocated), size(u.PSS))
		} else {
			row("memory", "no balloon, PSS %s", size(u.PSS))
		}
	}
	if m.Kernel != "" {
		row("kernel file", "%s", m.Kernel)
	}
	if len(m.Command) > 0 {
		row("command", "%s", printable(strings.Join(m.Command, " ")))
	}
	if m.Output != "" {
		row("output", "%s", m.Output)
	}
	exits := uint64(0)
	for _, n := range m.Stats.Exits {
		exits += n
	}
	row("exits", "%d", exits)
	if m.Stats.Syscalls > 0 {
		completed := uint64(0)
		for _, n := range m.Stats.Completed {
			completed += n
		}
		row("completed", "%d system calls, %d instructions", m.Stats.Syscalls, completed)
	}
	if r := m.Requests; r != nil {
		printRequests(row, r)
	}
	if len(m.Devices) > 0 {
		if err := tw.Flush(); err != nil {
			return err
		}
		fmt.Fprintln(tw)
		printDevices(tw, m.Devices)
		if g != nil {
			fmt.Fprintln(tw)
		}
	}
	if g == nil {
		return tw.Flush()
	}
	row("guest", "%s, Linux %s, %d CPUs, up %s", printable(g.Hostname), printable(g.Kernel), g.CPUs, shortDuration(time.Duration(g.UptimeMS)*time.Millisecond))
	row("agent", "%s", printable(g.Agent))
	row("load", "%.2f %.2f %.2f", g.Load[0], g.Load[1], g.Load[2])
	row("memory", "%s of %s available, %s cached", size(g.Memory.Available), size(g.Memory.Total), size(g.Memory.Cached))
	if err := tw.Flush(); err != nil {
		return err
	}
	fmt.Fprintln(tw, "\nPID\tPPID\tUSER\tSTATE\tCPU\tRSS\tTHREADS\tCOMMAND")
	for _, p := range g.Processes {
		if p.Kernel && !all {
			continue
		}
		name := p.Command
		if name == "" {
			name = "[" + p.Name + "]"
		}
		user := printable(p.User)
		if user == "" {
			user = strconv.Itoa(p.UID)
		}
		cpu := time.Duration(p.UserMS+p.SystemMS) * time.Millisecond
		fmt.Fprintf(tw, "%d\t%d\t%s\t%s\t%.2fs\t%s\t%d\t%s\n", p.PID, p.PPID, user, printable(p.State), cpu.Seconds(), size(p.RSS), p.Threads, shorten(printable(name), 80))
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	shown := false
	for _, c := range g.Connections {
		if c.PID == 0 && !all {
			continue
		}
		if !shown {
			fmt.Fprintln(tw, "\nPROTO\tLOCAL\tREMOTE\tSTATE\tPID\tRECEIVED\tSENT")
			shown = true
		}
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%d\t%s\t%s\n", printable(c.Protocol), orDash(printable(c.Local)), orDash(printable(c.Remote)),
			orDash(printable(c.State)), c.PID, size(c.RxBytes), size(c.TxBytes))
	}
	if g.Truncated {
		fmt.Fprintf(tw, "\nThe lists are cut at %d entries.\n", proto.MaxList)
	}
	return tw.Flush()
}

// printRequests describes the service behind port A. Every event goes to every
// carrier, so that those of the ones in use are what matters; the others are in the
// JSON.
func printRequests(row func(title, format string, a ...any), r *control.Requests) {
	said := []string{fmt.Sprint(r.Performed)}
	for _, c := range []struct {
		n    uint64
		what string
	}{{r.Denied, "denied"}, {r.Refused, "refused as malformed or with an id in use"}, {r.Cut, "cut short"}, {r.Skipped, "bytes of garbage skipped"}} {
		if c.n > 0 {
			said = append(said, fmt.Sprintf("%d %s", c.n, c.what))
		}
	}
	row("requests", "%s", strings.Join(said, ", "))
	if r.Events > 0 {
		said = []string{fmt.Sprint(r.Events)}
		for _, c := range r.Carriers {
			if c.Requests > 0 {
				said = append(said, fmt.Sprintf("over %s %d wait and %d were lost", c.Name, c.Waiting, c.Lost))
			}
		}
		row("events", "%s", strings.Join(said, ", "))
	}
	if left := time.Until(time.Unix(0, r.Marked)); left > 0 {
		row("time-critical", "for %s: %s", shortDuration(left), orDash(printable(r.Why)))
	}
}

// size is n bytes with three digits or so and a unit.
func size(n uint64) string {
	v, unit := float64(n), ""
	for _, u := range []string{"K", "M", "G", "T", "P"} {
		if v < 1024 {
			break
		}
		v, unit = v/1024, u
	}
	if unit == "" || v >= 10 {
		return fmt.Sprintf("%.0f%s", v, unit)
	}
	return fmt.Sprintf("%.1f%s", v, unit)
}
