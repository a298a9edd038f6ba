package metrics

import (
	"strings"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/silo-nbd/silo-nbd/internal/control"
	"github.com/silo-nbd/silo-nbd/pkg/lazy"
	"github.com/silo-nbd/silo-nbd/pkg/migrate"
)

// collector makes metrics of what it sees at the moment.
type collector struct{ see Sight }

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("silo_nbd_"+name, help, labels, nil)
}

var (
	info = desc("info", "1: what runs.", "role", "version")

	diskSize       = desc("disk_size_bytes", "Size of the disk.", "disk")
	diskDone       = desc("disk_done_bytes", "What is settled: local at a dest; confirmed, or not needed, at a source.", "disk")
	diskComplete   = desc("disk_complete", "1 when the source is not needed any more.", "disk")
	diskConnected  = desc("disk_connected", "1 while there is a connection to the other side.", "disk")
	diskReconnects = desc("disk_reconnects_total", "Connections after the first.", "disk")

	diskDamaged = desc("disk_damaged_total", "Packets whose contents arrived damaged and were sent again.", "disk")

	sourceSent      = desc("source_sent_bytes_total", "Data that went out, by what for: background, or demand (somebody waits for it).", "disk", "kind")
	sourcePass      = desc("source_pass", "Pass over what has changed, from 1, of a disk that is in use; 0 of others.", "disk")
	sourceDirty     = desc("source_dirty_bytes", "What clients have written and the destination does not have, of a disk that is in use.", "disk")
	sourceWrites    = desc("source_write_bytes_per_second", "What clients write, of a disk that is in use.", "disk")
	sourceWindow    = desc("source_window_bytes", "How much of the background may be sent and not answered.")
	sourceInFlight  = desc("source_in_flight_bytes", "How much of the background is sent and not answered.")
	sourceDelivery  = desc("source_delivery_bytes_per_second", "What the path takes, the best of late; 0 while it is not known.")
	sourceRoundTrip = desc("source_round_trip_seconds", "Round trip of a packet of the background, the least of late; 0 while it is not known.")
	sourceRate      = desc("source_rate_limit_bytes_per_second", "Bound of the background; 0 is none.")
	sourcePaused    = desc("source_paused", "1 while the background is paused.")

	destReceived = desc("dest_received_bytes_total", "Disk content that came from the source.", "disk")
	destBlocks   = desc("dest_blocks", "Blocks by state: missing, fetched (from the source), written (here).", "disk", "state")
	destPartial  = desc("dest_partial_blocks", "Missing blocks of which a part was written here.", "disk")
	destWaiting  = desc("dest_waiting_reads", "Reads that wait for a block now.", "disk")
	destOldest   = desc("dest_oldest_wait_seconds", "How long the first of them has waited.", "disk")
	destAsked    = desc("dest_asked_total", "Runs of blocks that the source was asked for.", "disk")
	destDemand   = desc("dest_demand_read_seconds", "How long reads of missing blocks have waited.", "disk")
	destFlush    = desc("dest_flush_seconds", "How long flushes have taken, the device's own too.", "disk")

	nbdClients = desc("nbd_clients", "NBD clients that are attached.")
	nbdWaiting = desc("nbd_waiting_requests", "NBD requests that wait for data now.")
)

// Describe implements prometheus.Collector. It promises nothing: what there is
// depends on the process.
func (c *collector) Describe(chan<- *prometheus.Desc) {}

// Collect implements prometheus.Collector.
func (c *collector) Collect(all chan<- prometheus.Metric) {
	s := sink{all}
	s.gauge(info, 1, c.see.Role, c.see.Version)
	for _, d := range c.see.Disks() {
		s.disk(d, c.see.Role)
	}
	if c.see.Path != nil {
		p, _ := c.see.Path() // all zero without a connection
		s.gauge(sourceWindow, float64(p.Window))
		s.gauge(sourceInFlight, float64(p.InFlight))
		s.gauge(sourceDelivery, p.Rate)
		s.gauge(sourceRoundTrip, p.RoundTrip.Seconds())
	}
	if c.see.Pace != nil {
		s.gauge(sourceRate, float64(c.see.Pace.Rate()))
		s.gauge(sourcePaused, truth(c.see.Pace.Paused()))
	}
	if c.see.Devices != nil {
		for name, st := range c.see.Devices() {
			s.device(name, st)
		}
	}
	if c.see.NBD != nil {
		n := c.see.NBD()
		s.gauge(nbdClients, float64(n.Clients))
		s.gauge(nbdWaiting, float64(n.Waiting))
	}
}

// sink takes metrics.
type sink struct{ all chan<- prometheus.Metric }

func (s sink) gauge(d *prometheus.Desc, v float64, labels ...string) {
	s.all <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
}

func (s sink) counter(d *prometheus.Desc, v float64, labels ...string) {
	s.all <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, v, labels...)
}

func (s sink) latency(d *prometheus.Desc, l lazy.Latency, labels ...string) {
	buckets, below := make(map[float64]uint64, len(lazy.LatencyBounds)), uint64(0)
	for i, bound := range lazy.LatencyBounds {
		below += l.Counts[i]
		buckets[bound.Seconds()] = below
	}
	s.all <- prometheus.MustNewConstHistogram(d, l.Count(), l.Sum.Seconds(), buckets, labels...)
}

func (s sink) disk(d migrate.DiskStatus, role string) {
	d.Name = label(d.Name)
	s.gauge(diskSize, float64(d.Size), d.Name)
	s.gauge(diskDone, float64(d.BytesDone), d.Name)
	s.gauge(diskComplete, truth(d.State == migrate.StateComplete), d.Name)
	s.gauge(diskConnected, truth(d.Connected), d.Name)
	s.counter(diskReconnects, float64(d.Reconnects), d.Name)
	s.counter(diskDamaged, float64(d.Damaged), d.Name)
	if role == control.RoleSource {
		s.counter(sourceSent, float64(d.BytesSent-d.BytesAsked), d.Name, "background")
		s.counter(sourceSent, float64(d.BytesAsked), d.Name, "demand")
		s.gauge(sourcePass, float64(d.Pass), d.Name)
		s.gauge(sourceDirty, float64(d.DirtyBytes), d.Name)
		s.gauge(sourceWrites, d.WriteRate, d.Name)
		return
	}
	s.counter(destReceived, float64(d.BytesReceived), d.Name)
	s.gauge(destWaiting, float64(d.Waiting), d.Name)
	s.gauge(destOldest, d.OldestWait.Seconds(), d.Name)
}

func (s sink) device(name string, st lazy.Stats) {
	name = label(name)
	s.gauge(destBlocks, float64(st.Missing), name, "missing")
	s.gauge(destBlocks, float64(st.Fetched), name, "fetched")
	s.gauge(destBlocks, float64(st.Written), name, "written")
	s.gauge(destPartial, float64(st.Partial), name)
	s.counter(destAsked, float64(st.Asked), name)
	s.latency(destDemand, st.DemandReads, name)
	s.latency(destFlush, st.Flushes, name)
}

// label makes a name, which comes from the other side, fit for a label.
func label(name string) string { return strings.ToValidUTF8(name, "?") }

func truth(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
