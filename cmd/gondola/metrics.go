//go:build !lean

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/prometheus/common/expfmt"
	"github.com/spf13/cobra"

	"github.com/gondola-vmm/gondola/devices/iostat"
	"github.com/gondola-vmm/gondola/scheduler/fleet"
	"github.com/gondola-vmm/gondola/scheduler/rules"
	"github.com/gondola-vmm/gondola/vmm/control"
)

// defaultMetrics is where gondola metrics listens.
const defaultMetrics = "127.0.0.1:9184"

func metricsCommand() *cobra.Command {
	var listen, services string
	var once bool
	c := &cobra.Command{
		Use:   "metrics",
		Short: "Serve metrics of the running machines for Prometheus",
		Long: `Serve the counters of all running machines of this user, and of fleets, at /metrics
on --listen, in Prometheus' text formats, until Ctrl-C (docs/metrics.md has the
names). A scrape asks the machines; between scrapes nothing is done. Who can reach
the address can read them: keep it local, or behind something that asks who it is.

With --services, the states of a file's services (docs/rules.md) are among them: a
scrape looks into the guests then, which costs each what a cycle of rules does.

gondola fleet up --metrics serves the same for one fleet.`,
		Example: `  gondola metrics --listen 127.0.0.1:9184
  gondola metrics --services services.yaml
  gondola metrics --once | grep gondola_machine_exits_total`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			home, err := openHome()
			if err != nil {
				return err
			}
			defer home.Close()
			m := newMetrics(home, "", nil)
			defer m.clients.Close()
			if services != "" {
				if m.services, err = readServices(services); err != nil {
					return err
				}
			}
			if once {
				return m.print(cmd.OutOrStdout())
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			l, err := listenMetrics(listen)
			if err != nil {
				return err
			}
			fmt.Fprintf(os.Stderr, "gondola: metrics at http://%s/metrics\n", l.Addr())
			return serveHTTP(ctx, l, m.mux())
		},
	}
	c.Flags().StringVar(&listen, "listen", defaultMetrics, "address and port")
	c.Flags().StringVar(&services, "services", "", "file with services, whose states are told (docs/rules.md)")
	c.Flags().BoolVar(&once, "once", false, "print them once and end")
	return c
}

// listenMetrics listens at the address of --listen or --metrics.
func listenMetrics(addr string) (net.Listener, error) {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, usageError{fmt.Errorf("metrics at %q: %w; want ADDRESS:PORT, for example %s", addr, err, defaultMetrics)}
	}
	return l, nil
}

// serveHTTP serves until ctx ends.
func serveHTTP(ctx context.Context, l net.Listener, h http.Handler) error {
	s := &http.Server{Handler: h, ReadHeaderTimeout: answerTimeout, IdleTimeout: time.Minute}
	stop := context.AfterFunc(ctx, func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		if s.Shutdown(ctx) != nil {
			s.Close() // somebody is slow
		}
	})
	defer stop()
	if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// metrics collects what Prometheus asks for (docs/metrics.md). It is a
// prometheus.Collector that keeps nothing: a scrape is a look at all machines.
type metrics struct {
	clients  *clients
	fleet    string // "": all machines
	fleets   func() []fleetStatus
	services []rules.Service
	registry *prometheus.Registry
}

// newMetrics makes the metrics of all machines, or of a fleet's. fleets tells what
// their supervisors know; nil asks those that are up.
func newMetrics(home *control.Home, only string, fleets func() []fleetStatus) *metrics {
	m := &metrics{clients: newClients(home), fleet: only, fleets: fleets, registry: prometheus.NewRegistry()}
	if m.fleets == nil {
		m.fleets = allFleets
	}
	build := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "gondola_build_info", Help: "1, with the version of gondola that serves these metrics.", ConstLabels: prometheus.Labels{"version": buildVersion()},
	})
	build.Set(1)
	m.registry.MustRegister(m, build, collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// allFleets are the fleets that are up.
func allFleets() []fleetStatus {
	names, err := fleetNames()
	if err != nil {
		return nil
	}
	var list []fleetStatus
	for _, n := range names {
		if s, err := (&fleetDir{path: fleetPath(n)}).status(context.Background()); err == nil {
			list = append(list, s)
		}
	}
	return list
}

func (m *metrics) mux() *http.ServeMux {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", m.handler())
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		_, _ = io.WriteString(w, `<html><title>gondola</title><a href="/metrics">metrics</a></html>`)
	})
	return mux
}

func (m *metrics) handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{MaxRequestsInFlight: 4})
}

// print writes the metrics as text.
func (m *metrics) print(w io.Writer) error {
	families, err := m.registry.Gather()
	if err != nil {
		return err
	}
	enc := expfmt.NewEncoder(w, expfmt.NewFormat(expfmt.TypeTextPlain))
	for _, f := range families {
		if err := enc.Encode(f); err != nil {
			return err
		}
	}
	return nil
}

// Descriptions of the metrics. Labels that a guest could choose are not among them.
var (
	onMachineLabel = []string{"machine", "fleet"}

	descUp          = desc("machine_up", "1 if the machine's process answers, else 0.")
	descInfo        = desc("machine_info", "1, with what does not change of a machine.", "state", "host", "kernel")
	descStart       = desc("machine_start_time_seconds", "When the machine was started, in seconds since 1970.")
	descVCPUs       = desc("machine_vcpus", "Virtual processors.")
	descShares      = desc("machine_shares", "Part in the division of the host's resources.")
	descCritical    = desc("machine_time_critical", "1 if the machine is marked time-critical, by the host's configuration or by its guest.")
	descCPU         = desc("machine_cpu_seconds_total", "Processor time of the vCPU threads: of the guest and of the monitor.", "mode")
	descWait        = desc("machine_cpu_wait_seconds_total", "Time that vCPU threads wanted to run and waited for a processor.")
	descWakes       = desc("machine_wakeups_total", "Times that a vCPU thread slept and woke up.")
	descExits       = desc("machine_exits_total", "Returns from KVM_RUN by reason.", "reason")
	descSyscalls    = desc("machine_syscalls_total", "System calls brought into the guest's kernel, on PVM hosts.")
	descCompleted   = desc("machine_completed_instructions_total", "Instructions completed for KVM, on PVM hosts.", "instruction")
	descMemory      = desc("machine_memory_bytes", "Memory that the machine was configured with.")
	descMemoryMin   = desc("machine_memory_min_bytes", "Memory that is never taken from the machine.")
	descMemoryMax   = desc("machine_memory_max_bytes", "Memory that the machine is given at most.")
	descTarget      = desc("machine_memory_target_bytes", "Memory that the guest shall have.")
	descActual      = desc("machine_memory_actual_bytes", "Memory that the guest has: all but the balloon.")
	descAllocated   = desc("machine_memory_allocated_bytes", "Host memory behind the guest's, RAM or swap.")
	descPSS         = desc("machine_memory_pss_bytes", "Proportional set size of the guest's memory.")
	descSwap        = desc("machine_memory_swap_bytes", "Of the guest's memory, what the host has swapped out.")
	descActive      = desc("machine_memory_active_bytes", "Estimate of the memory that the guest uses, if it is sampled.")
	descReported    = desc("machine_memory_reported_bytes_total", "Memory that the guest reported free (free page reporting).")
	descLate        = desc("machine_balloon_late", "1 if the guest does not follow its target.")
	descGuestMemory = desc("machine_guest_memory_bytes", "What the guest says of its memory (virtio-balloon statistics).", "statistic")
	descOps         = desc("machine_device_operations_total", "Operations of a disk or a network; read is received, write sent.", "device", "kind", "operation")
	descBytes       = desc("machine_device_bytes_total", "Bytes of operations that did not fail.", "device", "kind", "operation")
	descErrors      = desc("machine_device_errors_total", "Operations that failed.", "device", "kind", "operation")
	descFlight      = desc("machine_device_operations_in_flight", "Operations that have begun and not ended.", "device", "kind")
	descThrottled   = desc("machine_device_throttled_total", "Times that a rate limit held the device up.", "device", "kind")
	descLimit       = desc("machine_device_limit_bytes_per_second", "Rate limit; none is no sample.", "device", "kind")
	descLatency     = desc("machine_device_operation_duration_seconds", "How long operations took.", "device", "kind", "operation")
	descRequests    = desc("machine_requests_total", "Requests of the guest over port A by what became of them.", "outcome")
	descEvents      = desc("machine_events_total", "Events raised on port B.")

	descFleetUp       = &lazyDesc{name: "fleet_supervised", help: "1 if the fleet's supervisor runs, else 0.", labels: []string{"fleet"}}
	descFleetState    = desc("fleet_machine_state", "1 for the state that a machine of a fleet is in, 0 for the others.", "state")
	descFleetRestarts = desc("fleet_machine_restarts_total", "Times that a machine of a fleet was started again.")
	descFleetCode     = desc("fleet_machine_last_exit_code", "Exit code of the machine's last end, if it is known.")

	descService        = &lazyDesc{name: "service_state", help: "1 for the state that a service is in, 0 for the others.", labels: []string{"service", "state"}}
	descServiceMachine = &lazyDesc{name: "service_machine_state", help: "1 for the state that a machine of a service is in, 0 for the others.", labels: []string{"service", "machine", "state"}}
	descServiceMissing = &lazyDesc{name: "service_machine_missing_components", help: "Components of the service that the machine lacks.", labels: []string{"service", "machine"}}
)

func desc(name, help string, labels ...string) *lazyDesc {
	return &lazyDesc{name: name, help: help, labels: slices.Concat(onMachineLabel, labels)}
}

// lazyDesc is a description that is made when it is needed: a machine's start shall
// not pay for it.
type lazyDesc struct {
	name, help string
	labels     []string
	once       sync.Once
	made       *prometheus.Desc
}

func (d *lazyDesc) get() *prometheus.Desc {
	d.once.Do(func() { d.made = prometheus.NewDesc("gondola_"+d.name, d.help, d.labels, nil) })
	return d.made
}

// Describe implements prometheus.Collector: which metrics there are depends on the
// machines, so that none is promised.
func (m *metrics) Describe(chan<- *prometheus.Desc) {}

// Collect implements prometheus.Collector.
func (m *metrics) Collect(ch chan<- prometheus.Metric) {
	all, err := m.clients.observe(context.Background(), machineTimeout)
	if err != nil {
		ch <- prometheus.NewInvalidMetric(descUp.get(), err)
		return
	}
	for i := range all {
		if o := &all[i]; m.fleet == "" || o.Labels[labelFleet] == m.fleet {
			collectMachine(ch, o)
		}
	}
	for _, f := range m.fleets() {
		collectFleet(ch, &f)
	}
	collectSched(ch, m.fleetsOf(all))
	if len(m.services) > 0 {
		m.collectServices(ch)
	}
}

// collectServices looks into the guests for what services are made of (S4.9).
func (m *metrics) collectServices(ch chan<- prometheus.Metric) {
	last, err := lookAtAll(context.Background(), m.clients.home)
	if err != nil {
		ch <- prometheus.NewInvalidMetric(descService.get(), err)
		return
	}
	send := func(d *lazyDesc, state rules.Health, labels ...string) {
		for _, s := range []rules.Health{rules.Healthy, rules.Degraded, rules.Failed} {
			v := 0.
			if s == state {
				v = 1
			}
			ch <- prometheus.MustNewConstMetric(d.get(), prometheus.GaugeValue, v, slices.Concat(labels, []string{s.String()})...)
		}
	}
	for i := range m.services {
		h := m.services[i].Check(last)
		service := valid(h.Service)
		send(descService, h.State, service)
		for _, x := range h.Machines {
			send(descServiceMachine, x.State, service, valid(x.Machine))
			ch <- prometheus.MustNewConstMetric(descServiceMissing.get(), prometheus.GaugeValue, float64(len(x.Missing)), service, valid(x.Machine))
		}
	}
}

// valid makes a label's value valid: names come from files and guests.
func valid(s string) string { return strings.ToValidUTF8(printable(s), "?") }

func collectMachine(ch chan<- prometheus.Metric, o *observation) {
	own := []string{valid(o.Name), valid(o.Labels[labelFleet])}
	send := func(d *lazyDesc, t prometheus.ValueType, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d.get(), t, v, slices.Concat(own, labels)...)
	}
	gauge := func(d *lazyDesc, v float64, labels ...string) { send(d, prometheus.GaugeValue, v, labels...) }
	count := func(d *lazyDesc, v uint64, labels ...string) {
		send(d, prometheus.CounterValue, float64(v), labels...)
	}
	if o.err != nil {
		gauge(descUp, 0)
		return
	}
	gauge(descUp, 1)
	gauge(descInfo, 1, o.State, o.Host, valid(o.Kernel))
	gauge(descStart, float64(o.Started)/1e9)
	gauge(descVCPUs, float64(o.VCPUs))
	gauge(descShares, float64(o.Policy.Shares))
	critical := 0.
	if o.Policy.TimeCritical || o.sample.MarkedFor > 0 {
		critical = 1
	}
	gauge(descCritical, critical)
	if o.timed {
		send(descCPU, prometheus.CounterValue, float64(o.sample.Guest)/1e9, "guest")
		send(descCPU, prometheus.CounterValue, float64(o.sample.Run-min(o.sample.Guest, o.sample.Run))/1e9, "monitor")
		send(descWait, prometheus.CounterValue, float64(o.sample.Wait)/1e9)
		count(descWakes, o.sample.Wakes)
	}
	for reason, n := range o.Stats.Exits {
		count(descExits, n, strings.ToLower(strings.TrimPrefix(reason, "KVM_EXIT_")))
	}
	if o.Stats.Syscalls > 0 {
		count(descSyscalls, o.Stats.Syscalls)
	}
	for name, n := range o.Stats.Completed {
		count(descCompleted, n, valid(name))
	}
	gauge(descMemory, float64(o.Memory))
	gauge(descMemoryMin, float64(o.Policy.Min))
	gauge(descMemoryMax, float64(o.Policy.Max))
	if u := o.Use; u != nil {
		collectMemory(gauge, count, u)
	}
	names := map[string]bool{}
	for i := range o.Devices {
		d := &o.Devices[i]
		if names[d.Name] { // two series of the same labels would spoil the scrape
			continue
		}
		names[d.Name] = true
		collectDevice(ch, own, gauge, count, d)
	}
	if r := o.Requests; r != nil {
		count(descRequests, r.Performed-min(r.Denied, r.Performed), "performed")
		count(descRequests, r.Denied, "denied")
		count(descRequests, r.Refused, "refused")
		count(descRequests, r.Cut, "cut")
		count(descEvents, r.Events)
	}
}

type (
	gaugeFunc func(d *lazyDesc, v float64, labels ...string)
	countFunc func(d *lazyDesc, v uint64, labels ...string)
)

func collectMemory(gauge gaugeFunc, count countFunc, u *control.Memory) {
	gauge(descPSS, float64(u.PSS))
	gauge(descSwap, float64(u.Swap))
	if u.Intervals > 0 {
		gauge(descActive, float64(u.Active))
	}
	if !u.Balloon {
		return
	}
	gauge(descTarget, float64(u.Target))
	gauge(descActual, float64(u.Actual))
	gauge(descAllocated, float64(u.Allocated))
	count(descReported, u.Reported)
	late := 0.
	if u.Late {
		late = 1
	}
	gauge(descLate, late)
	for name, n := range u.Stats {
		if s, ok := strings.CutSuffix(name, "_bytes"); ok {
			gauge(descGuestMemory, float64(n), valid(s))
		}
	}
}

func collectDevice(ch chan<- prometheus.Metric, own []string, gauge gaugeFunc, count countFunc, d *iostat.Info) {
	name, kind := valid(d.Name), valid(d.Kind)
	for _, c := range []struct {
		operation string
		stats     *iostat.ClassStats
	}{{"read", &d.Stats.Read}, {"write", &d.Stats.Write}, {"other", &d.Stats.Other}} {
		count(descOps, c.stats.Ops, name, kind, c.operation)
		count(descBytes, c.stats.Bytes, name, kind, c.operation)
		count(descErrors, c.stats.Errors, name, kind, c.operation)
		ch <- latency(c.stats, slices.Concat(own, []string{name, kind, c.operation}))
	}
	gauge(descFlight, float64(d.Stats.InFlight), name, kind)
	count(descThrottled, d.Stats.Throttled, name, kind)
	if d.Limits.BytesPerSecond > 0 {
		gauge(descLimit, float64(d.Limits.BytesPerSecond), name, kind)
	}
}

// latency is the histogram of a class of operations. Its buckets end at 2^i µs; every
// second one is told, from 16 µs to 4 s, which is what disks and networks take.
func latency(c *iostat.ClassStats, labels []string) prometheus.Metric {
	const first, last, step = 4, 22, 2
	buckets, sum, total := map[float64]uint64{}, uint64(0), uint64(0)
	for i := range max(len(c.Latency), last+1) {
		if i < len(c.Latency) {
			total += c.Latency[i]
		}
		if i <= last {
			sum = total
			if i >= first && i%step == 0 {
				buckets[float64(uint64(1)<<i)/1e6] = sum
			}
		}
	}
	return prometheus.MustNewConstHistogram(descLatency.get(), total, float64(c.Nanos)/1e9, buckets, labels...)
}

// fleetStates are all states of a fleet's machine.
var fleetStates = []fleet.State{fleet.Waiting, fleet.Starting, fleet.Up, fleet.BackingOff, fleet.Ended, fleet.Failed, fleet.Stopping, fleet.Stopped}

func collectFleet(ch chan<- prometheus.Metric, f *fleetStatus) {
	up := 0.
	if f.PID != 0 {
		up = 1
	}
	ch <- prometheus.MustNewConstMetric(descFleetUp.get(), prometheus.GaugeValue, up, valid(f.Name))
	for _, m := range f.Machines {
		own := []string{valid(m.Name), valid(f.Name)}
		for _, s := range fleetStates {
			v := 0.
			if m.State == s {
				v = 1
			}
			ch <- prometheus.MustNewConstMetric(descFleetState.get(), prometheus.GaugeValue, v, slices.Concat(own, []string{string(s)})...)
		}
		ch <- prometheus.MustNewConstMetric(descFleetRestarts.get(), prometheus.CounterValue, float64(m.Restarts), own...)
		if m.Last != nil && m.Last.Known {
			ch <- prometheus.MustNewConstMetric(descFleetCode.get(), prometheus.GaugeValue, float64(m.Last.Code), own...)
		}
	}
}
