//go:build !lean

package main

import (
	"slices"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/gondola-vmm/gondola/scheduler"
)

// Descriptions of the scheduler's metrics (S2.10).
var (
	descSchedUp        = &lazyDesc{name: "sched_running", help: "1 if gondola sched run runs, else 0."}
	descSchedCPU       = &lazyDesc{name: "sched_cpu_seconds_total", help: "Processor time of the running scheduler."}
	descSchedStep      = &lazyDesc{name: "sched_last_step_timestamp_seconds", help: "When the scheduler last looked at the machines, in seconds since 1970."}
	descSchedDecisions = &lazyDesc{name: "sched_decisions_total", help: "Decisions since the scheduler was started.", labels: []string{"kind"}}
	descSchedOutcomes  = &lazyDesc{name: "sched_outcomes_total", help: "Decisions that were measured afterwards, by what became of them.", labels: []string{"outcome"}}

	descSchedHas        = desc("sched_allocation", "What the scheduler gives the machine: processors, bytes a second or bytes.", "resource")
	descSchedBase       = desc("sched_configured", "What the machine has by its configuration, in the same units.", "resource")
	descSchedNeed       = desc("sched_need", "What the machine needs, by what it used and waited for, in the same units.", "resource")
	descSchedClass      = desc("sched_class", "1 if the machine is judged to be of the class, else 0.", "class")
	descSchedConfidence = desc("sched_confidence", "How sure that judgement is, 0 to 1.")
	descSchedWait       = desc("sched_wait_ratio", "Part of the time in which the machine wanted a processor that it waited for one.")
)

// schedKinds are all kinds of decisions, schedClasses all classes of machines.
var (
	schedKinds = []scheduler.Kind{
		scheduler.Moved, scheduler.Traded, scheduler.Returned, scheduler.RolledBack, scheduler.Refused, scheduler.Marked, scheduler.Unmarked, scheduler.Judged,
	}
	schedClasses = []scheduler.Class{
		scheduler.ProcessorBound, scheduler.NetworkBound, scheduler.DiskBound, scheduler.MemoryBound, scheduler.TimeCritical, scheduler.Idle,
	}
)

// collectSched tells what the scheduler does with machines, whose fleets are given. A
// scheduler that has ended has nothing but the word that it does not run.
func collectSched(ch chan<- prometheus.Metric, fleets map[string]string) {
	s, running, err := readStatus()
	send := func(d *lazyDesc, t prometheus.ValueType, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d.get(), t, v, labels...)
	}
	if err != nil || !running {
		send(descSchedUp, prometheus.GaugeValue, 0)
		return
	}
	send(descSchedUp, prometheus.GaugeValue, 1)
	send(descSchedCPU, prometheus.CounterValue, s.CPU.Seconds())
	send(descSchedStep, prometheus.GaugeValue, float64(s.Time.UnixMilli())/1e3)
	for _, k := range schedKinds {
		send(descSchedDecisions, prometheus.CounterValue, float64(s.Decisions[k]), string(k))
	}
	for _, o := range []string{outcomeKept, outcomeUndone} {
		send(descSchedOutcomes, prometheus.CounterValue, float64(s.Outcomes[o]), o)
	}
	for i := range s.Machines {
		m := &s.Machines[i]
		name, ok := fleets[m.Machine]
		if !ok {
			continue // it has gone, or is not asked for
		}
		own := []string{valid(m.Machine), valid(name)}
		gauge := func(d *lazyDesc, v float64, labels ...string) {
			send(d, prometheus.GaugeValue, v, slices.Concat(own, labels)...)
		}
		for _, r := range scheduler.Resources {
			if s.Capacity[r] > 0 {
				gauge(descSchedHas, m.Has[r], r.String())
				gauge(descSchedBase, m.Base[r], r.String())
			}
			gauge(descSchedNeed, m.Need.Amounts[r], r.String())
		}
		for _, c := range schedClasses {
			v := 0.
			if m.Eval.Class.Has(c) {
				v = 1
			}
			gauge(descSchedClass, v, c.String())
		}
		gauge(descSchedConfidence, m.Eval.Confidence)
		gauge(descSchedWait, m.Rates.WaitShare())
	}
}

// fleetsOf are the fleets of the machines that are collected, by machine.
func (m *metrics) fleetsOf(all []observation) map[string]string {
	fleets := map[string]string{}
	for i := range all {
		if f := all[i].Labels[labelFleet]; m.fleet == "" || f == m.fleet {
			fleets[all[i].Name] = f
		}
	}
	return fleets
}
